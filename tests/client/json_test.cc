#include "client/json.h"

#include <gtest/gtest.h>

#include "larder/v1/inspector.pb.h"
#include "larder/v1/kv_cache.pb.h"
#include "larder/v1/types.pb.h"

namespace larder::cli {
namespace {

TEST(ToJson, IdsAreHexAndEnumsAreNames) {
  v1::Model model;
  model.set_model_id(0xabc);
  model.set_fingerprint(std::string("\x01\xff", 2));
  model.set_block_bytes(uint64_t{1} << 60);
  model.mutable_spec()->set_name("tiny");
  model.mutable_spec()->set_dtype(v1::DTYPE_BF16);
  const Json json = ToJson(model);
  EXPECT_EQ(json["model_id"], "0000000000000abc");
  EXPECT_EQ(json["fingerprint"], "01ff");
  EXPECT_EQ(json["block_bytes"], uint64_t{1} << 60);
  EXPECT_EQ(json["block_tokens"], 0);
  EXPECT_EQ(json["spec"]["dtype"], "BF16");
  EXPECT_EQ(json["spec"]["name"], "tiny");
}

TEST(ToJson, OffsetsAreNumbers) {
  v1::Run run;
  run.set_tier(v1::TIER_HOST);
  run.add_offsets(4096);
  run.add_offsets(8192);
  EXPECT_EQ(Dump(ToJson(run)),
            R"({"tier":"HOST","arena":0,"position":0,"blocks":0,"offsets":[4096,8192]})");
}

TEST(ToJson, EveryFieldIsThere) {
  const Json json = ToJson(v1::Status());
  EXPECT_EQ(json.size(), static_cast<size_t>(v1::Status::descriptor()->field_count()));
  EXPECT_EQ(json["leases"], 0);
  EXPECT_EQ(json["draining"], false);
  EXPECT_EQ(json["tiers"], Json::array());
}

TEST(ToJson, UnsetMessagesAndOneofsAreLeftOut) {
  EXPECT_EQ(Dump(ToJson(v1::AttachEvent())), "{}");
  v1::AttachEvent event;
  event.mutable_draining()->set_grace_ms(5);
  EXPECT_EQ(Dump(ToJson(event)), R"({"draining":{"grace_ms":5}})");
}

TEST(Dump, ReplacesWhatIsNotUtf8) { EXPECT_EQ(Dump("a\xff"), "\"a\xEF\xBF\xBD\""); }

}  // namespace
}  // namespace larder::cli
