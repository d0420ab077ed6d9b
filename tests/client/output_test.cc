#include "client/output.h"

#include <gtest/gtest.h>

namespace larder::cli {
namespace {

TEST(Table, AlignsColumns) {
  Table table({"TIER", ">BLOCKS", "HEALTH"});
  EXPECT_TRUE(table.empty());
  table.AddRow({"GPU", "1,024", "OK"});
  table.AddRow({"HOST", "7"});
  EXPECT_EQ(table.Render(),
            "TIER  BLOCKS  HEALTH\n"
            "GPU    1,024  OK\n"
            "HOST       7\n");
}

TEST(Table, GivesATerminalNoOrders) {
  Table table({"WORKER"});
  table.AddRow({"a\x1b[2J\nb\x7f caf\xc3\xa9"});
  EXPECT_EQ(table.Render(), "WORKER\na?[2J?b? caf\xc3\xa9\n");
}

TEST(Format, Counts) {
  EXPECT_EQ(FormatCount(0), "0");
  EXPECT_EQ(FormatCount(999), "999");
  EXPECT_EQ(FormatCount(1000), "1,000");
  EXPECT_EQ(FormatCount(1234567), "1,234,567");
}

TEST(Format, Bytes) {
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.0 KiB");
  EXPECT_EQ(FormatBytes(64ull << 20), "64.0 MiB");
  EXPECT_EQ(FormatBytes(5ull << 50), "5120.0 TiB");
}

TEST(Format, Others) {
  EXPECT_EQ(FormatRate(0), "-");
  EXPECT_EQ(FormatRate(1.5e6), "1.5 MB/s");
  EXPECT_EQ(FormatRate(2.345e9), "2.35 GB/s");
  EXPECT_EQ(FormatPercent(1, 8), "12.5%");
  EXPECT_EQ(FormatPercent(0, 0), "-");
  EXPECT_EQ(FormatMicroseconds(870), "870 us");
  EXPECT_EQ(FormatMicroseconds(1250), "1.25 ms");
  EXPECT_EQ(FormatMicroseconds(3.1e6), "3.10 s");
  EXPECT_EQ(FormatAge(59), "59s");
  EXPECT_EQ(FormatAge(192), "3m12s");
  EXPECT_EQ(FormatAge(5 * 3600 + 7 * 60), "5h07m");
  EXPECT_EQ(FormatAge(51 * 3600), "2d03h");
  EXPECT_EQ(FormatId(0xabc), "0000000000000abc");
}

TEST(ProgressLine, DrawsABar) {
  EXPECT_EQ(ProgressLine("put", 0, 10, ""), "put [------------------------------] 0/10");
  EXPECT_EQ(ProgressLine("put", 5, 10, "x"), "put [###############---------------] 5/10 x");
  EXPECT_EQ(ProgressLine("put", 12, 10, ""), "put [##############################] 12/10");
  EXPECT_EQ(ProgressLine("put", 0, 0, ""), "put [##############################] 0/0");
}

}  // namespace
}  // namespace larder::cli
