#include "kernels/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>
#include <vector>

namespace larder::kernels {
namespace {

TEST(ThreadPoolTest, RunsEveryIndexOnceAndShowsWhatWasWritten) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.threads(), threads);
    for (int64_t loop = 0; loop < 300; ++loop) {
      const int64_t count = loop % 40;
      std::vector<int64_t> runs(count, 0);  // not atomic: each index is one thread's
      std::vector<int> workers(count, -1);
      pool.ParallelFor(count, [&](int64_t i, int worker) {
        runs[i] += loop + 1;
        workers[i] = worker;
      });
      for (int64_t i = 0; i < count; ++i) {
        ASSERT_EQ(runs[i], loop + 1) << "index " << i << " of " << count;
        ASSERT_GE(workers[i], 0);
        ASSERT_LT(workers[i], threads);
      }
    }
  }
}

// Indices that wait for each other: they can only end on different threads.
TEST(ThreadPoolTest, AllThreadsWorkAtOnce) {
  constexpr int kThreads = 4;
  ThreadPool pool(kThreads);
  for (int loop = 0; loop < 20; ++loop) {
    std::atomic<int> arrived = 0;
    std::vector<int> workers(kThreads);
    pool.ParallelFor(kThreads, [&](int64_t i, int worker) {
      workers[i] = worker;
      ++arrived;
      while (arrived < kThreads) std::this_thread::yield();
    });
    EXPECT_EQ(std::set<int>(workers.begin(), workers.end()).size(), size_t{kThreads});
  }
}

TEST(ThreadPoolTest, ZeroMeansOneForEachCpu) {
  EXPECT_GE(ThreadPool().threads(), 1);
  EXPECT_EQ(ThreadPool(-3).threads(), ThreadPool().threads());
}

}  // namespace
}  // namespace larder::kernels
