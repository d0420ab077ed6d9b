// NvmeWritten: hours that pass, clocks that jump, bytes that were stored.

#include "storage/nvme_written.h"

#include <cstdint>
#include <limits>
#include <string>

#include "absl/strings/string_view.h"
#include "gtest/gtest.h"

namespace larder {
namespace {

const absl::Time kNow = absl::FromUnixSeconds(500'000 * int64_t{3600} + 1800);

NvmeWritten SomeNow() {
  NvmeWritten written;
  written.Advance(kNow);
  written.Add(7);
  return written;
}

TEST(NvmeWritten, AnHourCountsForADayAfterItHasEnded) {
  NvmeWritten written = SomeNow();
  written.Advance(kNow + absl::Minutes(29));
  EXPECT_EQ(written.bytes(0), 7u);
  written.Advance(kNow + absl::Minutes(31));
  EXPECT_EQ(written.bytes(0), 0u);
  EXPECT_EQ(written.bytes(1), 7u);
  written.Add(5);
  written.Advance(kNow + absl::Hours(24));
  EXPECT_EQ(written.bytes(24), 7u);
  EXPECT_EQ(written.bytes(23), 5u);
  EXPECT_EQ(written.total_bytes(), 12u);
  written.Advance(kNow + absl::Hours(25));
  EXPECT_EQ(written.total_bytes(), 5u);
  written.Advance(kNow + absl::Hours(1'000'000));
  EXPECT_EQ(written.total_bytes(), 0u);
}

TEST(NvmeWritten, AClockSetBackForgetsNothingAndGoesOnFromThere) {
  NvmeWritten written = SomeNow();
  written.Advance(kNow - absl::Hours(100'000));
  EXPECT_EQ(written.bytes(0), 7u);
  written.Advance(kNow - absl::Hours(100'000) + absl::Hours(24));
  EXPECT_EQ(written.bytes(24), 7u);
  written.Advance(kNow - absl::Hours(100'000) + absl::Hours(25));
  EXPECT_EQ(written.total_bytes(), 0u) << "it must not count for ever";
  written.Advance(absl::UnixEpoch() - absl::Hours(30));
  written.Add(3);
  EXPECT_EQ(written.total_bytes(), 3u);
}

TEST(NvmeWritten, SumsStopAtTheLargestNumber) {
  NvmeWritten written;
  constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
  written.Add(kMost - 1);
  written.Add(kMost);
  EXPECT_EQ(written.bytes(0), kMost);
  written.Add(2, 24);
  EXPECT_EQ(written.total_bytes(), kMost);
}

TEST(NvmeWritten, IsStoredWhole) {
  NvmeWritten written = SomeNow();
  for (size_t ago = 0; ago < NvmeWritten::kHours; ++ago) written.Add(ago * 1000, ago);
  const auto bytes = written.Encode();
  auto again = NvmeWritten::Decode({bytes.data(), bytes.size()});
  ASSERT_TRUE(again.has_value());
  for (size_t ago = 0; ago < NvmeWritten::kHours; ++ago) {
    EXPECT_EQ(again->bytes(ago), ago * 1000 + (ago == 0 ? 7 : 0));
  }
  again->Advance(kNow + absl::Hours(1));
  EXPECT_EQ(again->bytes(1), 7u);
}

TEST(NvmeWritten, ADamagedOneIsNone) {
  const auto bytes = SomeNow().Encode();
  const std::string text(bytes.data(), bytes.size());
  for (size_t at = 0; at < text.size(); ++at) {
    std::string flipped = text;
    flipped[at] = static_cast<char>(flipped[at] ^ 0x10);
    EXPECT_FALSE(NvmeWritten::Decode(flipped)) << at;
  }
  EXPECT_FALSE(NvmeWritten::Decode(text.substr(1)));
  EXPECT_FALSE(NvmeWritten::Decode(""));
}

}  // namespace
}  // namespace larder
