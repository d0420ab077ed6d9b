// GpuGraphs on the emulated GPU: when steps are captured, which graphs are kept, and what becomes
// of a capture that fails. That graphs change no bit of a model is forward_pass_cuda_test's.

#include "client/worker/gpu_graphs.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/rows.h"

namespace larder::worker {
namespace {

using emulation::graphs_launched;
using testing::HasSubstr;

class GpuGraphsTest : public testing::Test {
 protected:
  // Copies `from` as a step of this key; whether its launches were made or captured.
  bool Run(int32_t key, float from) {
    *from_.As<float>() = from;
    const int before = launches_;
    graphs_.Run({.step = {.wanted = key}}, [&] {
      ++launches_;
      gpu_->Check(kernels::cuda::CopyRows({.from = from_.As<void>(),
                                           .from_stride = 4,
                                           .to = to_.As<void>(),
                                           .to_stride = 4,
                                           .rows = 1,
                                           .dim = 4},
                                          gpu_->stream()),
                  "CopyRows");
      if (waits_) gpu_->Check(cudaStreamSynchronize(gpu_->stream()), "waiting");
    });
    EXPECT_TRUE(gpu_->Finish().ok());
    EXPECT_EQ(*to_.As<float>(), from);
    return launches_ != before;
  }

  const std::unique_ptr<Gpu> gpu_ = *Gpu::Open();
  const GpuBuffer from_ = *GpuBuffer::Device(16);
  const GpuBuffer to_ = *GpuBuffer::Device(16);
  GpuGraphs graphs_{*gpu_};
  int launches_ = 0;
  bool waits_ = false;  // in a step, as nothing may that is captured
};

TEST_F(GpuGraphsTest, TheSecondTimeIsCaptured) {
  const uint64_t before = graphs_launched;
  EXPECT_TRUE(Run(1, 1));
  EXPECT_EQ(graphs_launched, before);
  EXPECT_TRUE(Run(1, 2));
  EXPECT_EQ(graphs_launched, before + 1);
  EXPECT_FALSE(Run(1, 3));
  EXPECT_TRUE(Run(2, 4));
  EXPECT_FALSE(Run(1, 5));
  EXPECT_EQ(graphs_launched, before + 3);
}

TEST_F(GpuGraphsTest, TheLongestUnusedGoes) {
  constexpr int kMax = GpuGraphs::kGraphsMax;
  for (int time = 0; time < 2; ++time) {
    for (int key = 0; key < kMax; ++key) EXPECT_TRUE(Run(key, 1));
  }
  EXPECT_FALSE(Run(0, 2));
  EXPECT_TRUE(Run(kMax, 3));  // in the place of 1
  EXPECT_FALSE(Run(0, 4));
  EXPECT_FALSE(Run(2, 5));
  EXPECT_TRUE(Run(1, 6));
}

TEST_F(GpuGraphsTest, AFailedCaptureFailsNoStep) {
  const uint64_t before = graphs_launched;
  waits_ = true;
  EXPECT_TRUE(Run(1, 1));
  testing::internal::CaptureStderr();
  EXPECT_TRUE(Run(1, 2));
  EXPECT_THAT(testing::internal::GetCapturedStderr(),
              HasSubstr("without CUDA graphs: CUDA: waiting: not permitted"));
  testing::internal::CaptureStderr();
  waits_ = false;
  for (int time = 0; time < 3; ++time) EXPECT_TRUE(Run(2, 3));
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  EXPECT_EQ(graphs_launched, before);
}

}  // namespace
}  // namespace larder::worker
