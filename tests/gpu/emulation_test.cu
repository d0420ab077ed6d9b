// What the emulator must catch: each kernel here is wrong in one way, beside its right form. Runs
// on the emulator only: a GPU forgives some of these most of the time.
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <numeric>

#include "kernels/cuda/numbers.h"
#include "tests/gpu/check.h"

namespace larder::gpu_tests {
namespace {

using namespace larder::kernels::cuda;  // NOLINT: a test of these names

constexpr int kThreads = 64;

// Reverses numbers through shared memory, in `rounds` rounds.
template <bool kFirstBarrier, bool kLastBarrier>
__global__ void Reverse(int* x, int rounds) {
  int* const shared = reinterpret_cast<int*>(DynamicShared());
  for (int round = 0; round < rounds; ++round) {
    shared[threadIdx.x] = x[threadIdx.x];
    if (kFirstBarrier) __syncthreads();
    x[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
    if (kLastBarrier) __syncthreads();
  }
}

template <bool kFirstBarrier, bool kLastBarrier>
bool Reverses() {
  std::vector<int> x(kThreads);
  std::iota(x.begin(), x.end(), 0);
  DeviceArray<int> device(x);
  Require(Launch(Reverse<kFirstBarrier, kLastBarrier>, {1, kThreads, kThreads * sizeof(int)},
                 nullptr, device.data(), 4),
          "Reverse");
  return device.Host() == x;
}

void MissingBarriersAreSeen(uint32_t) {
  Expect(Reverses<true, true>(), "the right kernel reverses");
  Expect(!Reverses<false, true>(), "a missing first barrier is seen");
  Expect(!Reverses<true, false>(), "a missing last barrier is seen");
}

// Adds up numbers that cp.async brings in stages of two.
template <bool kWait, bool kBarrier, bool kRefillLate>
__global__ void SumStages(const float* in, float* out, int stages) {
  float* const shared = reinterpret_cast<float*>(DynamicShared());
  const int floats = 4 * kThreads;
  const auto fetch = [&](int stage) {
    if (stage < stages) {
      CopyAsync16(shared + stage % 2 * floats + 4 * threadIdx.x,
                  in + stage * floats + 4 * threadIdx.x);
    }
    CopyAsyncCommit();
  };
  fetch(0);
  fetch(1);
  float sum = 0;
  for (int stage = 0; stage < stages; ++stage) {
    if (kWait) CopyAsyncWait<1>();
    if (kBarrier) __syncthreads();
    if (!kRefillLate) fetch(stage + 2);
    for (int i = 0; i < floats; ++i) sum += shared[stage % 2 * floats + i];
    __syncthreads();
    if (kRefillLate) fetch(stage + 2);
  }
  out[threadIdx.x] = sum;
}

template <bool kWait, bool kBarrier, bool kRefillLate>
bool Sums() {
  constexpr int kStages = 5;
  const std::vector<float> in(kStages * 4 * kThreads, 1);
  const DeviceArray<float> input(in);
  DeviceArray<float> out(kThreads);
  Require(Launch(SumStages<kWait, kBarrier, kRefillLate>,
                 {1, kThreads, 2 * 4 * kThreads * sizeof(float)}, nullptr, input.data(), out.data(),
                 kStages),
          "SumStages");
  return out.Host() == std::vector<float>(kThreads, static_cast<float>(in.size()));
}

void MissingWaitsAreSeen(uint32_t) {
  Expect(Sums<true, true, true>(), "the right kernel adds up");
  Expect(!Sums<false, true, true>(), "a missing wait is seen");
  Expect(!Sums<true, false, true>(), "a missing barrier after the wait is seen");
  Expect(!Sums<true, true, false>(), "a stage that is filled while others read it is seen");
}

// Shared memory holds NaN before it is written, and so does cp.async's target.
__global__ void ReadUnwritten(float* out) { *out = *reinterpret_cast<float*>(DynamicShared()); }

void SharedMemoryIsPoisoned(uint32_t) {
  DeviceArray<float> out(std::vector<float>{0});
  Require(Launch(ReadUnwritten, {1, 1, 16}, nullptr, out.data()), "ReadUnwritten");
  Expect(std::isnan(out.Host()[0]), "unwritten shared memory is NaN");
}

// Whether f ends the process by a signal.
bool Dies(const std::function<void()>& f) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  // Sanitizers turn a fault into an exit status of their own.
  return WIFSIGNALED(status) || WEXITSTATUS(status) != 0;
}

__global__ void DivergentBarrier() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void DivergentCollective(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 == 0 ? __shfl_xor_sync(kAllLanes, 1, 2)
                                          : static_cast<int>(__ballot_sync(kAllLanes, true));
}
__global__ void WritePast(int* out, int index) {
  int* const shared = reinterpret_cast<int*>(DynamicShared());
  shared[index] = 1;
  *out = shared[0];
}
__global__ void LoadMisaligned(uint32_t* out) {
  uint32_t r[4];
  LoadMatrix4(r, DynamicShared() + 16 * threadIdx.x + 2);
  out[threadIdx.x] = r[0];
}
__global__ void LoadForeign(uint32_t* out) {
  uint32_t r[4];
  LoadMatrix4(r, out);
  out[threadIdx.x] = r[0];
}

void FatalMistakesEndTheProcess(uint32_t) {
  DeviceArray<int> out(64);
  DeviceArray<uint32_t> words(64);
  Expect(!Dies([&] {
    (void)Launch(WritePast, {1, 1, 64}, nullptr, out.data(), 15);
  }),
         "a write inside");
  Expect(Dies([&] {
           (void)Launch(WritePast, {1, 1, 64}, nullptr, out.data(), 16);
         }),
         "a write past the end");
  Expect(Dies([&] {
           (void)Launch(WritePast, {1, 1, 64}, nullptr, out.data(), 32);
         }),
         "a write at the guard page");
  Expect(Dies([&] { (void)Launch(DivergentBarrier, {1, 64}, nullptr); }), "a divergent barrier");
  Expect(Dies([&] {
           (void)Launch(DivergentCollective, {1, 32}, nullptr, out.data());
         }),
         "a divergent collective");
  Expect(Dies([&] {
           (void)Launch(LoadMisaligned, {1, 32, 1024}, nullptr, words.data());
         }),
         "a misaligned ldmatrix");
  Expect(Dies([&] {
           (void)Launch(LoadForeign, {1, 32, 1024}, nullptr, words.data());
         }),
         "an ldmatrix of global memory");
}

struct Total {
  float value;
};
__global__ void Collectives(int* out) {
  const int lane = threadIdx.x % 32;
  bool right = __shfl_xor_sync(kAllLanes, lane, 5) == (lane ^ 5);
  right = right && __shfl_sync(kAllLanes, lane, 3) == 3;
  right = right && __shfl_down_sync(kAllLanes, lane, 4) == (lane < 28 ? lane + 4 : lane);
  right = right && __shfl_up_sync(kAllLanes, lane, 4) == (lane >= 4 ? lane - 4 : lane);
  right = right && __ballot_sync(kAllLanes, lane % 2 == 0) == 0x55555555u;
  Total& total = StaticShared<Total>();
  if (threadIdx.x == 0) total.value = 7;
  __syncthreads();
  right = right && total.value == 7;
  BarrierSync(1, 32);
  if (right) atomicAdd(out, 1);
}

void CollectivesAgree(uint32_t) {
  DeviceArray<int> out(std::vector<int>{0});
  Require(Launch(Collectives, {5, 32}, nullptr, out.data()), "Collectives");
  Expect(out.Host()[0] == 5 * 32, "shuffles, votes and static shared memory");
}

__global__ void Add(int* to, const int* from, int x) { *to = *from + x; }

// What a graph was captured with by value stays; what it points at is read when it is launched.
void GraphsReadMemoryWhenLaunched(uint32_t) {
  DeviceArray<int> from(std::vector<int>{1});
  DeviceArray<int> to(std::vector<int>{0});
  DeviceArray<int> copy(std::vector<int>{0});
  int x = 10;
  Require(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeThreadLocal), "begin");
  Require(Launch(Add, {1, 1}, nullptr, to.data(), from.data(), x), "Add");
  Require(cudaMemcpyAsync(copy.data(), to.data(), sizeof(int), cudaMemcpyDeviceToDevice), "copy");
  cudaGraph_t graph = nullptr;
  Require(cudaStreamEndCapture(nullptr, &graph), "end");
  Expect(to.Host()[0] == 0 && copy.Host()[0] == 0, "nothing runs while it is captured");
  x = 20;
  cudaGraphExec_t exec = nullptr;
  Require(cudaGraphInstantiate(&exec, graph), "instantiate");
  Require(cudaGraphDestroy(graph), "destroy");
  for (const int value : {2, 3}) {
    Require(cudaMemcpy(from.data(), &value, sizeof(int), cudaMemcpyHostToDevice), "set");
    Require(cudaGraphLaunch(exec, nullptr), "launch");
    Expect(to.Host()[0] == value + 10 && copy.Host()[0] == value + 10, "memory as it is now");
  }
  Require(cudaGraphExecDestroy(exec), "destroy");
}

void WaitingBreaksACapture(uint32_t) {
  DeviceArray<int> to(std::vector<int>{0});
  const auto ended = [&](const std::function<cudaError_t()>& forbidden) {
    Require(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeThreadLocal), "begin");
    Require(cudaMemsetAsync(to.data(), 1, sizeof(int)), "set");
    const bool refused = forbidden() == cudaErrorStreamCaptureUnsupported;
    cudaGraph_t graph = nullptr;
    const cudaError_t error = cudaStreamEndCapture(nullptr, &graph);
    return refused && error == cudaErrorStreamCaptureInvalidated && graph == nullptr;
  };
  Expect(ended([] { return cudaStreamSynchronize(nullptr); }), "waiting");
  Expect(ended([] {
           void* p = nullptr;
           return cudaMalloc(&p, 1);
         }),
         "allocating");
  Expect(ended([&] { return cudaMemset(to.data(), 1, sizeof(int)); }), "a call that waits");
  Expect(to.Host()[0] == 0, "nothing has run");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(
      argc, argv,
      std::vector<Case>{{"missing_barriers_are_seen", 20, MissingBarriersAreSeen},
                        {"missing_waits_are_seen", 20, MissingWaitsAreSeen},
                        {"shared_memory_is_poisoned", 1, SharedMemoryIsPoisoned},
                        {"fatal_mistakes_end_the_process", 1, FatalMistakesEndTheProcess},
                        {"collectives_agree", 10, CollectivesAgree},
                        {"graphs_read_memory_when_launched", 1, GraphsReadMemoryWhenLaunched},
                        {"waiting_breaks_a_capture", 1, WaitingBreaksACapture}});
}
