// AVX2, FMA and F16C. Compiled with flags of its own (variant.h, rule 1).
#include <immintrin.h>

#include "kernels/variant_table.h"

namespace larder::kernels {
namespace {

struct Vec {
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kValueVecs = 2;
  // All but bfloat16 take longer to widen than float32 to load.
  static constexpr int DirectRows(DType dtype) { return dtype == DType::kBf16 ? kTileRows : 8; }

  static F Zero() { return _mm256_setzero_ps(); }
  static F Set(float x) { return _mm256_set1_ps(x); }
  static F Load(const float* from) { return _mm256_loadu_ps(from); }
  static void Store(float* to, F x) { _mm256_storeu_ps(to, x); }
  static float First(F x) { return _mm256_cvtss_f32(x); }

  static F Add(F a, F b) { return _mm256_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm256_div_ps(a, b); }
  static F Max(F a, F b) { return _mm256_max_ps(a, b); }
  static F Min(F a, F b) { return _mm256_min_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F Fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
  static F Round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n as a float32's exponent field; n in [-126, 127].
  static F Scale(F x, F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static F ZeroBelow(F y, F x, F bound) {
    return _mm256_and_ps(y, _mm256_cmp_ps(x, bound, _CMP_NLT_UQ));
  }
  static float SumOf(F x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static float MaxOf(F x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
  }

  template <DType D>
  static F LoadAs(const std::byte* from) {
    if constexpr (D == DType::kF32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    if constexpr (D == DType::kI8 || D == DType::kF8E4M3) {
      const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
      if constexpr (D == DType::kI8) return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
      return FromE4m3(codes);
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (D == DType::kF16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  // As float16, whose fields are wider; 0x7f is NaN.
  static F FromE4m3(__m128i codes) {
    return _mm256_cvtph_ps(NanWhere7f(Fields(_mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7))));
  }
  // Likewise, by words of two codes: a multiplication extends the lower one.
  [[gnu::always_inline]] static void LoadE4m3(const std::byte* from, F (&to)[2]) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    __m128i even = Fields(_mm_maddubs_epi16(_mm_set1_epi16(0x80), codes));
    __m128i odd = Fields(_mm_srai_epi16(codes, 1));
    const __m128i negative = _mm_or_si128(codes, _mm_set1_epi8(-0x80));
    if (_mm_movemask_epi8(_mm_cmpeq_epi8(negative, _mm_set1_epi8(-1))) != 0) [[unlikely]] {
      even = NanWhere7f(even);
      odd = NanWhere7f(odd);
    }
    to[0] = _mm256_cvtph_ps(even);
    to[1] = _mm256_cvtph_ps(odd);
  }
  // Of codes from bit 7 on, sign-extended, so that bit 15 is the sign; bit 14, which is too, goes.
  static __m128i Fields(__m128i codes) {
    return _mm_and_si128(codes, _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
  }
  static __m128i NanWhere7f(__m128i halves) {
    const __m128i largest = _mm_set1_epi16(0x3f80);
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(halves, largest), largest);
    return _mm_or_si128(halves, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
  }

  template <DType D>
  static void StoreAs(std::byte* to, F x) {
    if constexpr (D == DType::kF32) {
      _mm256_storeu_ps(reinterpret_cast<float*>(to), x);
    } else {
      __m128i halves;
      if constexpr (D == DType::kF16) {
        halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      } else {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
        halves =
            _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
    }
  }

  static F FirstBf16(const std::byte* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), halves));
  }
  static F LastBf16(const std::byte* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), halves));
  }

  [[gnu::always_inline]] static F SumsOf(F (&x)[8]) {
    // Halves of halves, halves; then halves among each other.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = Add(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                 _mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      x[i] = Add(_mm256_shuffle_ps(x[2 * i], x[2 * i + 1], 0x44),
                 _mm256_shuffle_ps(x[2 * i], x[2 * i + 1], 0xee));
    }
    return Add(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
  }
};

}  // namespace

constinit const Variant kAvx2Variant = TableOf<Vec>();

}  // namespace larder::kernels
