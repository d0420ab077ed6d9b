// Tests of kernels as programs of their own: nothing but the standard library and the CUDA runtime,
// so that nvcc alone builds them where a GPU is; the same sources run in ctest on the emulator.
//
//   PROGRAM [--seed=N] [CASE...]    each case for its seeds, or for that one; exit status 1 when
//                                   any failed. A failure prints the seed and the case's literal
//   PROGRAM --list                  the names of its cases
//
// Thread safety: none.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace larder::gpu_tests {

struct Case {
  const char* name;
  uint32_t seeds;  // runs 1 to `seeds`
  void (*run)(uint32_t seed);
};

// ---- What a case says.

struct State {
  uint32_t seed = 0;
  double worst = 0;  // largest error as a part of what was allowed
  int failures = 0;
};
inline State state;

inline void Fail(const std::string& what) {
  ++state.failures;
  std::printf("    FAILED seed %u: %s\n", state.seed, what.c_str());
}
inline void Expect(bool holds, const std::string& what) {
  if (!holds) Fail(what);
}
// `error` of a NaN comparison is infinite, see Distance.
inline void ExpectWithin(double error, double allowed, const std::string& literal) {
  state.worst = std::max(state.worst, error / allowed);
  if (error <= allowed) return;
  char text[96];
  std::snprintf(text, sizeof(text), "error %.3g, allowed %.3g: ", error, allowed);
  Fail(text + literal);
}
inline double Distance(double expected, double got) {
  if (expected == got || (std::isnan(expected) && std::isnan(got))) return 0;
  const double distance = std::abs(expected - got);
  return std::isnan(distance) ? std::numeric_limits<double>::infinity() : distance;
}
template <typename T, size_t N>
T Pick(std::mt19937& random, const T (&from)[N]) {
  return from[random() % N];
}
// CUDA itself failing ends the program: nothing after it would mean anything.
inline void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("    seed %u: %s: %s\n", state.seed, what, cudaGetErrorString(error));
  std::exit(1);
}

inline int RunCases(int argc, char** argv, std::span<const Case> cases) {
  uint32_t only_seed = 0;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::strncmp(argv[i], "--seed=", 7) == 0) {
      only_seed = static_cast<uint32_t>(std::strtoul(argv[i] + 7, nullptr, 10));
    } else if (std::strcmp(argv[i], "--list") == 0) {
      for (const Case& c : cases) std::printf("%s\n", c.name);
      return 0;
    } else {
      names.emplace_back(argv[i]);
    }
  }
  int failed = 0;
  for (const Case& c : cases) {
    bool wanted = names.empty();
    for (const std::string& name : names) wanted = wanted || name == c.name;
    if (!wanted) continue;
    state = {};
    const uint32_t first = only_seed != 0 ? only_seed : 1;
    const uint32_t last = only_seed != 0 ? only_seed : c.seeds;
    for (state.seed = first; state.seed <= last; ++state.seed) {
#if defined(LARDER_EMULATED_GPU)
      emulation::SetSeed(state.seed);
#endif
      c.run(state.seed);
    }
    std::printf("%-40s seeds %u-%u, worst error %.2f of the allowed: %s\n", c.name, first, last,
                state.worst, state.failures == 0 ? "ok" : "FAILED");
    std::fflush(stdout);
    failed += state.failures != 0;
  }
  return failed == 0 ? 0 : 1;
}

// ---- The device.

// A device whose blocks have `bytes` of shared memory, while it lives. A GPU stays what it is.
class SharedBytesMax {
 public:
#if defined(LARDER_EMULATED_GPU)
  static constexpr bool kHasEffect = true;
  explicit SharedBytesMax(int bytes) : before_(std::exchange(emulation::shared_bytes_max, bytes)) {}
  ~SharedBytesMax() { emulation::shared_bytes_max = before_; }
#else
  static constexpr bool kHasEffect = false;
  explicit SharedBytesMax(int bytes) : before_(bytes) {}
#endif
  SharedBytesMax(const SharedBytesMax&) = delete;
  SharedBytesMax& operator=(const SharedBytesMax&) = delete;

 private:
  [[maybe_unused]] const int before_;
};

// An array on the device. Unwritten bytes are all ones: NaN in every storage type.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
    Require(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T)), "cudaMalloc");
    Require(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
    Require(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
            "cudaMemcpy to the device");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  size_t size() const { return count_; }
  // Waits for the device and so reports what a kernel ran into.
  std::vector<T> Host() const {
    Require(cudaDeviceSynchronize(), "a kernel");
    std::vector<T> host(count_);
    Require(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost),
            "cudaMemcpy to the host");
    return host;
  }

 private:
  size_t count_;
  T* data_ = nullptr;
};

}  // namespace larder::gpu_tests
