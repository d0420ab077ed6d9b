// ptx.h against what the PTX ISA says, in plain loops on the host. On the emulator this tests the
// emulation; on a GPU, whether the emulation told the truth.
#include <algorithm>
#include <cstring>

#include "kernels/cuda/numbers.h"
#include "tests/gpu/check.h"

namespace larder::gpu_tests {
namespace {

using namespace larder::kernels::cuda;  // NOLINT: a test of these names

// One of each per lane: a product of fragments whose numbers come from matrices by ldmatrix.
struct Tiles {
  uint16_t a[16][16];  // rows
  uint16_t b[16][8];   // rows; loaded transposed
  uint16_t c[8][16];   // columns of B as rows: loaded as it lies
};

template <typename T>
__global__ void MultiplyTiles(const Tiles* tiles, float* d) {
  Tiles& shared = *reinterpret_cast<Tiles*>(DynamicShared());
  for (size_t i = threadIdx.x; i < sizeof(Tiles) / 16; i += kWarpLanes) {
    CopyAsync16(reinterpret_cast<uint4*>(&shared) + i, reinterpret_cast<const uint4*>(tiles) + i);
  }
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  __syncthreads();
  const int lane = threadIdx.x;
  uint32_t a[4];
  LoadMatrix4(a, &shared.a[lane % 16][lane / 16 * 8]);
  uint32_t b[4];
  LoadMatrix4Transposed(b, &shared.b[lane % 16][0]);
  uint32_t c[4];
  LoadMatrix4(c, &shared.c[lane % 8][lane / 8 % 2 * 8]);
  float product[2][4] = {};
  Mma<T>(product[0], a, {b[0], b[1]});
  Mma<T>(product[1], a, {c[0], c[1]});
  for (int which = 0; which < 2; ++which) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8;
      const int column = lane % 4 * 2 + i % 2;
      d[(which * 16 + row) * 8 + column] = product[which][i];
    }
  }
}

template <typename T>
void Products(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Tiles tiles;
  double a[16][16];
  double b[16][8];
  // Bits of 16-bit numbers whose values are simple: k / 8 for small k is exact in both formats.
  const auto bits = [](int eighths) -> uint16_t {
    const float x = static_cast<float>(eighths) / 8;
    if constexpr (std::is_same_v<T, Bf16>) {
      uint32_t word;
      std::memcpy(&word, &x, 4);
      return static_cast<uint16_t>(word >> 16);
    }
    if (eighths == 0) return 0;
    const int exponent = std::ilogb(x);
    const int digits = static_cast<int>(std::ldexp(std::abs(x), 10 - exponent));
    return static_cast<uint16_t>((eighths < 0 ? 0x8000 : 0) + ((exponent + 14) << 10) + digits);
  };
  for (auto& row : a) {
    for (double& x : row) {
      const int eighths = static_cast<int>(random() % 129) - 64;
      x = eighths / 8.0;
      tiles.a[&row - a][&x - row] = bits(eighths);
    }
  }
  for (auto& row : b) {
    for (double& x : row) {
      const int eighths = static_cast<int>(random() % 129) - 64;
      x = eighths / 8.0;
      tiles.b[&row - b][&x - row] = bits(eighths);
      tiles.c[&x - row][&row - b] = bits(eighths);
    }
  }
  const DeviceArray<Tiles> input(std::vector<Tiles>{tiles});
  DeviceArray<float> output(2 * 16 * 8);
  Require(Launch(MultiplyTiles<T>, {1, kWarpLanes, sizeof(Tiles)}, nullptr, input.data(),
                 output.data()),
          "MultiplyTiles");
  const std::vector<float> d = output.Host();
  double worst = 0;
  for (int which = 0; which < 2; ++which) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[i][k] * b[k][j];
        worst = std::max(worst, Distance(sum, d[(which * 16 + i) * 8 + j]));
      }
    }
  }
  ExpectWithin(worst, 1e-6, "a product of small eighths is exact");
}

// Every 16-bit number to float32 and back; midpoints go to even ones.
template <typename T>
__global__ void Convert(const float* in, uint16_t* out, float* back, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const T x = FromFloat<T>(in[i]);
  out[i] = x.bits;
  back[i] = ToFloat(x);
}

template <typename T>
void Conversions(uint32_t /*seed*/) {
  constexpr bool kIsBf16 = std::is_same_v<T, Bf16>;
  const auto value = [](uint32_t bits) {  // of finite positive bits
    const int fraction_bits = kIsBf16 ? 7 : 10;
    const int bias = kIsBf16 ? 127 : 15;
    const int exponent = static_cast<int>(bits >> fraction_bits);
    const int fraction = static_cast<int>(bits & ((1u << fraction_bits) - 1));
    return exponent == 0
               ? std::ldexp(fraction, 1 - bias - fraction_bits)
               : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  };
  const uint32_t infinity = kIsBf16 ? 0x7f80 : 0x7c00;
  std::vector<float> in;
  std::vector<uint16_t> expected;
  for (uint32_t bits = 0; bits + 1 < infinity; ++bits) {
    const double middle = (value(bits) + value(bits + 1)) / 2;
    const auto nearest = static_cast<uint16_t>(bits % 2 == 0 ? bits : bits + 1);
    for (const double sign : {1.0, -1.0}) {
      const uint16_t sign_bit = sign < 0 ? 0x8000 : 0;
      in.push_back(static_cast<float>(sign * value(bits)));
      expected.push_back(bits | sign_bit);
      // Between the two smallest bf16 lies no float32.
      if (static_cast<float>(middle) != middle) continue;
      in.push_back(static_cast<float>(sign * middle));
      expected.push_back(nearest | sign_bit);
    }
  }
  in.push_back(HUGE_VALF);
  expected.push_back(static_cast<uint16_t>(infinity));
  const DeviceArray<float> input(in);
  DeviceArray<uint16_t> output(in.size());
  DeviceArray<float> back(in.size());
  const int count = static_cast<int>(in.size());
  Require(Launch(Convert<T>, {static_cast<unsigned>(CeilDiv(count, 1024)), 1024}, nullptr,
                 input.data(), output.data(), back.data(), count),
          "Convert");
  const std::vector<uint16_t> got = output.Host();
  const std::vector<float> floats = back.Host();
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    const double magnitude = (got[i] & 0x7fff) == infinity ? HUGE_VAL : value(got[i] & 0x7fff);
    wrong +=
        got[i] != expected[i] || floats[i] != ((got[i] & 0x8000) != 0 ? -magnitude : magnitude);
  }
  Expect(wrong == 0, std::to_string(wrong) + " conversions differ");
}

__global__ void Transpose(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = TransposeMatrix(in[threadIdx.x]);
}

void MatricesAreTransposed(uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint32_t> in(32);
  for (uint32_t& x : in) x = static_cast<uint32_t>(random());
  const DeviceArray<uint32_t> input(in);
  DeviceArray<uint32_t> output(32);
  Require(Launch(Transpose, {1, 32}, nullptr, input.data(), output.data()), "Transpose");
  const std::vector<uint32_t> out = output.Host();
  const auto at = [](const std::vector<uint32_t>& m, int row, int column) {
    return m[row * 4 + column / 2] >> (column % 2 * 16) & 0xffff;
  };
  for (int i = 0; i < 64; ++i) {
    Expect(at(in, i / 8, i % 8) == at(out, i % 8, i / 8), "[i][j] goes to [j][i]");
  }
}

__global__ void Zeros(const uint4* in, uint4* out, uint32_t* out_words) {
  uint4* const shared = reinterpret_cast<uint4*>(DynamicShared());
  CopyAsync16(shared + threadIdx.x, threadIdx.x % 2 == 0 ? in + threadIdx.x : nullptr,
              threadIdx.x % 2 == 0);
  auto* const words = reinterpret_cast<uint32_t*>(shared + 32);
  CopyAsync4(words + threadIdx.x, threadIdx.x % 2 == 1 ? &in[threadIdx.x].y : nullptr,
             threadIdx.x % 2 == 1);
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  out[threadIdx.x] = shared[threadIdx.x];
  out_words[threadIdx.x] = words[threadIdx.x];
}

void CopiesOfNothingAreZero(uint32_t /*seed*/) {
  const DeviceArray<uint4> in(32);
  DeviceArray<uint4> out(32);
  DeviceArray<uint32_t> out_words(32);
  Require(Launch(Zeros, {1, 32, 32 * (sizeof(uint4) + sizeof(uint32_t))}, nullptr, in.data(),
                 out.data(), out_words.data()),
          "Zeros");
  const std::vector<uint4> got = out.Host();
  const std::vector<uint32_t> words = out_words.Host();
  for (int i = 0; i < 32; ++i) {
    Expect(got[i].x == (i % 2 == 0 ? 0xffffffffu : 0) && got[i].x == got[i].w, "16 bytes or zeros");
    Expect(words[i] == (i % 2 == 1 ? 0xffffffffu : 0), "4 bytes or zeros");
  }
}

__global__ void Powers(const float* in, float* exp2, float* log2) {
  exp2[threadIdx.x] = Exp2(in[threadIdx.x]);
  log2[threadIdx.x] = Log2(in[threadIdx.x]);
}

void ExpAndLog(uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> in = {0, -HUGE_VALF};
  while (in.size() < 256) in.push_back(static_cast<float>(random() % 100'000) / 1000 - 60);
  const DeviceArray<float> input(in);
  DeviceArray<float> exp2(256);
  DeviceArray<float> log2(256);
  Require(Launch(Powers, {1, 256}, nullptr, input.data(), exp2.data(), log2.data()), "Powers");
  const std::vector<float> e = exp2.Host();
  const std::vector<float> l = log2.Host();
  Expect(e[0] == 1 && e[1] == 0 && l[0] == -HUGE_VALF, "Exp2(0), Exp2(-inf), Log2(0)");
  double worst = 0;
  for (int i = 2; i < 256; ++i) {
    worst = std::max(worst, std::abs(e[i] / std::exp2(double{in[i]}) - 1));
    if (in[i] > 0) worst = std::max(worst, Distance(std::log2(double{in[i]}), l[i]) / 6);
  }
  ExpectWithin(worst, 4e-7, "ex2.approx and lg2.approx");
}

__global__ void Nothing() {}

void LaunchesSayTheirOwnErrorsOnly(uint32_t) {
  Expect(cudaSetDevice(-1) != cudaSuccess, "device -1");
  Expect(Launch(Nothing, {1, 32}, nullptr) == cudaSuccess, "a launch after another call's error");
  static_cast<void>(cudaGetLastError());
  Expect(Launch(Nothing, {1, 32, size_t{1} << 30}, nullptr) == cudaErrorLaunchOutOfResources,
         "more shared memory than there is");
  Expect(cudaGetLastError() == cudaSuccess, "an error that was returned is not kept as well");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  using larder::kernels::cuda::Bf16;
  using larder::kernels::cuda::F16;
  return RunCases(
      argc, argv,
      std::vector<Case>{{"products_bf16", 3, Products<Bf16>},
                        {"products_f16", 3, Products<F16>},
                        {"conversions_bf16", 1, Conversions<Bf16>},
                        {"conversions_f16", 1, Conversions<F16>},
                        {"matrices_are_transposed", 3, MatricesAreTransposed},
                        {"copies_of_nothing_are_zero", 1, CopiesOfNothingAreZero},
                        {"exp_and_log", 1, ExpAndLog},
                        {"launches_say_their_own_errors_only", 1, LaunchesSayTheirOwnErrorsOnly}});
}
