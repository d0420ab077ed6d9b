#include "machine_limits.h"

#include <algorithm>
#include <cstring>

#include "bench.h"
#include "kernels/cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace larder::bench {
namespace {

using kernels::Isa;

constexpr int64_t kStretchBytes = 256 << 10;
constexpr int64_t kFmaRounds = 1'000'000;
constexpr int kChains = 12;  // as many as hide the latency; they fit in 16 registers

// The compiler must not leave out what nobody reads.
volatile uint64_t sink;
volatile float float_sink;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t ReadAvx512(const std::byte* from, int64_t bytes) {
  __m512i any[4] = {};
  for (int64_t at = 0; at < bytes; at += 256) {
    for (int i = 0; i < 4; ++i) {
      any[i] = _mm512_or_si512(any[i], _mm512_loadu_si512(from + at + 64 * i));
    }
  }
  const __m512i all =
      _mm512_or_si512(_mm512_or_si512(any[0], any[1]), _mm512_or_si512(any[2], any[3]));
  uint64_t words[8];
  std::memcpy(words, &all, sizeof(words));
  return words[0] | words[7];
}

__attribute__((target("avx2"))) uint64_t ReadAvx2(const std::byte* from, int64_t bytes) {
  __m256i any[4] = {};
  for (int64_t at = 0; at < bytes; at += 128) {
    for (int i = 0; i < 4; ++i) {
      const auto* const line = reinterpret_cast<const __m256i*>(from + at + 32 * i);
      any[i] = _mm256_or_si256(any[i], _mm256_loadu_si256(line));
    }
  }
  const __m256i all =
      _mm256_or_si256(_mm256_or_si256(any[0], any[1]), _mm256_or_si256(any[2], any[3]));
  uint64_t words[4];
  std::memcpy(words, &all, sizeof(words));
  return words[0] | words[3];
}

__attribute__((target("avx512f"))) float FmaAvx512() {
  __m512 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
  const __m512 factor = _mm512_set1_ps(0.999f);
  for (int64_t round = 0; round < kFmaRounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(sums[i], factor, factor);
  }
  float total = 0;
  for (const __m512& sum : sums) total += _mm512_cvtss_f32(sum);
  return total;
}

__attribute__((target("avx2,fma"))) float FmaAvx2() {
  __m256 sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = _mm256_set1_ps(static_cast<float>(i));
  const __m256 factor = _mm256_set1_ps(0.999f);
  for (int64_t round = 0; round < kFmaRounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = _mm256_fmadd_ps(sums[i], factor, factor);
  }
  float total = 0;
  for (const __m256& sum : sums) total += _mm256_cvtss_f32(sum);
  return total;
}
#endif

uint64_t ReadPortable(const std::byte* from, int64_t bytes) {
  uint64_t any = 0;
  for (int64_t at = 0; at < bytes; at += 8) {
    uint64_t word;
    std::memcpy(&word, from + at, sizeof(word));
    any |= word;
  }
  return any;
}

float FmaPortable() {
  float sums[kChains] = {};
  for (int64_t round = 0; round < kFmaRounds; ++round) {
    for (float& sum : sums) sum = sum * 0.999f + 0.999f;
  }
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

uint64_t Read(Isa isa, const std::byte* from, int64_t bytes) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return ReadAvx512(from, bytes);
  if (isa == Isa::kAvx2) return ReadAvx2(from, bytes);
#endif
  return ReadPortable(from, bytes);
}

float Fma(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return FmaAvx512();
  if (isa == Isa::kAvx2) return FmaAvx2();
#endif
  return FmaPortable();
}

int64_t Lanes(Isa isa) { return isa == Isa::kAvx512 ? 16 : isa == Isa::kAvx2 ? 8 : 1; }

}  // namespace

double ReadSeconds(kernels::ThreadPool& pool, std::span<const std::byte> memory) {
  const Isa isa = kernels::BestIsa();
  const auto bytes = static_cast<int64_t>(memory.size()) / 256 * 256;
  return Timed([&] {
    pool.ParallelFor((bytes + kStretchBytes - 1) / kStretchBytes, [&](int64_t i, int) {
      const int64_t begin = i * kStretchBytes;
      sink = Read(isa, memory.data() + begin, std::min(kStretchBytes, bytes - begin));
    });
  });
}

double FmaGflops(kernels::ThreadPool& pool) {
  const Isa isa = kernels::BestIsa();
  const int64_t parts = pool.threads() * 4;
  const double seconds =
      Timed([&] { pool.ParallelFor(parts, [&](int64_t, int) { float_sink = Fma(isa); }); });
  return static_cast<double>(parts * kFmaRounds * kChains * Lanes(isa) * 2) / seconds / 1e9;
}

}  // namespace larder::bench
