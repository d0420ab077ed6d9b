#include "storage/units.h"

#include <gtest/gtest.h>

#include "storage/slab_size.h"

namespace larder {
namespace {

TEST(Units, ParsesBytes) {
  EXPECT_EQ(ParseBytes("0"), 0u);
  EXPECT_EQ(ParseBytes("4096"), 4096u);
  EXPECT_EQ(ParseBytes("64KiB"), 65536u);
  EXPECT_EQ(ParseBytes("512MiB"), uint64_t{512} << 20);
  EXPECT_EQ(ParseBytes("8GiB"), uint64_t{8} << 30);
  EXPECT_EQ(ParseBytes("16TiB"), uint64_t{1} << 44);
}

TEST(Units, RefusesOtherBytes) {
  for (const char* text : {"", "GiB", "8GB", "8 GiB", "8gib", "1.5GiB", "-1", "+1", "0x10", "8GiBs",
                           "99999999999999999999", "18446744073709551615KiB"}) {
    EXPECT_EQ(ParseBytes(text), std::nullopt) << text;
  }
}

TEST(Units, FormatsBytes) {
  EXPECT_EQ(FormatBytes(0), "0 bytes");
  EXPECT_EQ(FormatBytes(4097), "4097 bytes");
  EXPECT_EQ(FormatBytes(uint64_t{64} << 20), "64 MiB");
  EXPECT_EQ(FormatBytes(uint64_t{1536} << 20), "1536 MiB");
  EXPECT_EQ(FormatBytes(uint64_t{8} << 30), "8 GiB");
}

TEST(Units, ParsesFractions) {
  EXPECT_DOUBLE_EQ(ParseFraction("5%").value(), 0.05);
  EXPECT_DOUBLE_EQ(ParseFraction("0.25").value(), 0.25);
  EXPECT_DOUBLE_EQ(ParseFraction("0").value(), 0);
  for (const char* text : {"", "%", "101%", "-1%", "1.5", "five", "nan"}) {
    EXPECT_EQ(ParseFraction(text), std::nullopt) << text;
  }
}

TEST(SlabSize, IsA64thButNotTooSmall) {
  constexpr uint64_t kMiB = 1 << 20;
  EXPECT_EQ(SlabSize(1 * kMiB), 1 * kMiB);
  EXPECT_EQ(SlabSize(4 * kMiB), 2 * kMiB);
  EXPECT_EQ(SlabSize(64 * kMiB), 16 * kMiB);
  EXPECT_EQ(SlabSize(1024 * kMiB), 32 * kMiB);
  EXPECT_EQ(SlabSize(1024 * 1024 * kMiB), 16 * 1024 * kMiB);
  EXPECT_EQ(SlabSize(3001 * kMiB), 48 * kMiB);
}

}  // namespace
}  // namespace larder
