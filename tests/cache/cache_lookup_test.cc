// What a lookup finds where a path is partly in memory and goes on on NVMe.
#include <gtest/gtest.h>

#include "tests/cache/cache_fixture.h"

namespace larder::testing {
namespace {

// The lease ends inside a node, and the match ends further on inside the same one: the keys of
// what follows start from that node, not from one above it.
TEST(Lookup, AnExtendedLeaseFindsWhatOnlyNvmeHasFromTheMiddleOfANode) {
  Fixture f({.host = 16, .nvme = 64});
  const Tokens shared = Prompt("p", 6);
  const Tokens in_memory = shared + Prompt("a", 4);
  const Tokens on_nvme = shared + Prompt("b", 4);
  f.Store(on_nvme);
  ASSERT_TRUE(f.world.Settle());
  f.world.Restart();
  f.Open();
  const auto lease = f.world.PutAll(f.session, f.model, in_memory);
  ASSERT_TRUE(lease.ok()) << lease.status();
  ASSERT_TRUE(f.world.Settle());
  f.Release(*lease);
  ASSERT_EQ(f.Where(on_nvme), (Tiers{0, 6, 4}));

  LookupOptions extend;
  extend.lease = f.Look(Prompt("p", 4)).lease;
  const auto found = f.cache().Lookup(f.session, f.model, Fixture::Part(on_nvme, 4, 6), extend);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->matched_blocks, 10u);
  f.cache().CheckInvariants();
}

}  // namespace
}  // namespace larder::testing
