// IoQueue: reads first, writes beside them a little at a time, and never without end.

#include "storage/io_queue.h"

#include <string>

#include "gtest/gtest.h"

namespace larder {
namespace {

class IoQueueTest : public ::testing::Test {
 protected:
  void Push(bool write, uint64_t bytes) { queue_.Push({0, nullptr, bytes, write, nullptr}); }
  // Starts all that may: 'r' or 'w' each.
  std::string StartAll() {
    std::string started;
    while (queue_.MayStart()) started += queue_.Next()->write ? 'w' : 'r';
    EXPECT_FALSE(queue_.Next().has_value());
    return started;
  }

  IoQueue queue_{{.reads = 3,
                  .read_bytes = 100,
                  .writes = 4,
                  .write_bytes = 100,
                  .write_bytes_beside_reads = 20}};
};

TEST_F(IoQueueTest, ReadsFirstAndFewWritesBesideThem) {
  for (int i = 0; i < 5; ++i) Push(/*write=*/true, 10);
  for (int i = 0; i < 5; ++i) Push(/*write=*/false, 10);
  EXPECT_EQ(StartAll(), "rrrww");  // three reads; 20 bytes of writes
  queue_.Done(/*write=*/false, 10);
  EXPECT_EQ(StartAll(), "r");
  queue_.Done(/*write=*/true, 10);
  EXPECT_EQ(StartAll(), "w");  // reads cannot keep writes away for ever
  for (int i = 0; i < 3; ++i) queue_.Done(/*write=*/false, 10);
  EXPECT_EQ(StartAll(), "r");
  EXPECT_FALSE(queue_.empty());
  queue_.Done(/*write=*/false, 10);
  EXPECT_EQ(StartAll(), "ww");  // no reads: up to four
  EXPECT_TRUE(queue_.empty());
}

TEST_F(IoQueueTest, BytesUnderWayAreLimited) {
  for (int i = 0; i < 3; ++i) Push(/*write=*/false, 50);
  EXPECT_EQ(StartAll(), "rr");
  queue_.Done(/*write=*/false, 50);
  EXPECT_EQ(StartAll(), "r");
  queue_.Done(/*write=*/false, 50);
  queue_.Done(/*write=*/false, 50);
  for (int i = 0; i < 3; ++i) Push(/*write=*/true, 50);
  EXPECT_EQ(StartAll(), "ww");
}

TEST_F(IoQueueTest, OneMayAlwaysBeUnderWay) {
  Push(/*write=*/false, 1000);
  Push(/*write=*/false, 1);
  Push(/*write=*/true, 1000);
  Push(/*write=*/true, 1);
  EXPECT_EQ(StartAll(), "rw");
  queue_.Done(/*write=*/true, 1000);
  EXPECT_EQ(StartAll(), "w");
}

}  // namespace
}  // namespace larder
