// AVX-512 F, BW, DQ and VL. Compiled with flags of its own (variant.h, rule 1).
#include <immintrin.h>

#include "kernels/variant_table.h"

namespace larder::kernels {
namespace {

struct Vec {
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kValueVecs = 4;
  // All but bfloat16 take longer to widen than float32 to load.
  static constexpr int DirectRows(DType dtype) { return dtype == DType::kBf16 ? kTileRows : 8; }

  static F Zero() { return _mm512_setzero_ps(); }
  static F Set(float x) { return _mm512_set1_ps(x); }
  static F Load(const float* from) { return _mm512_loadu_ps(from); }
  static void Store(float* to, F x) { _mm512_storeu_ps(to, x); }
  static float First(F x) { return _mm512_cvtss_f32(x); }

  static F Add(F a, F b) { return _mm512_add_ps(a, b); }
  static F Sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F Div(F a, F b) { return _mm512_div_ps(a, b); }
  static F Max(F a, F b) { return _mm512_max_ps(a, b); }
  static F Min(F a, F b) { return _mm512_min_ps(a, b); }
  static F Fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F Fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
  static F Round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
  static F Scale(F x, F n) { return _mm512_scalef_ps(x, n); }
  static F ZeroBelow(F y, F x, F bound) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_NLT_UQ), y);
  }
  static float SumOf(F x) { return _mm512_reduce_add_ps(x); }
  static float MaxOf(F x) { return _mm512_reduce_max_ps(x); }

  template <DType D>
  static F LoadAs(const std::byte* from) {
    if constexpr (D == DType::kF32) return _mm512_loadu_ps(from);
    if constexpr (D == DType::kI8 || D == DType::kF8E4M3) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      if constexpr (D == DType::kI8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
      return FromE4m3(codes);
    }
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (D == DType::kF16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  // As float16, whose fields are wider; 0x7f is NaN.
  static F FromE4m3(__m128i codes) {
    // Sign-extended, so that bit 15 is the sign; bit 14, which is too, goes.
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
    const __m128i magnitude = _mm_and_si128(codes, _mm_set1_epi8(0x7f));
    const __mmask16 nan = _mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(0x7f));
    return _mm512_cvtph_ps(_mm256_mask_mov_epi16(half, nan, _mm256_set1_epi16(0x7e00)));
  }

  // Likewise, by words of two codes: a multiplication extends the lower one.
  [[gnu::always_inline]] static void LoadE4m3(const std::byte* from, F (&to)[4]) {
    const __m512i codes = _mm512_loadu_si512(from);
    const __m512i fields = _mm512_set1_epi16(static_cast<int16_t>(0xbf80));
    __m512i even = _mm512_and_si512(_mm512_maddubs_epi16(_mm512_set1_epi16(0x80), codes), fields);
    __m512i odd = _mm512_and_si512(_mm512_srai_epi16(codes, 1), fields);
    const __m512i negative = _mm512_or_si512(codes, _mm512_set1_epi8(-0x80));
    if (_mm512_cmpeq_epi8_mask(negative, _mm512_set1_epi8(-1)) != 0) [[unlikely]] {
      even = NanWhere7f(even);
      odd = NanWhere7f(odd);
    }
    to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(even));
    to[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
    to[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
    to[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
  }
  static __m512i NanWhere7f(__m512i halves) {
    const __m512i largest = _mm512_set1_epi16(0x3f80);
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(halves, largest), largest);
    return _mm512_mask_mov_epi16(halves, nan, _mm512_set1_epi16(0x7e00));
  }

  template <DType D>
  static void StoreAs(std::byte* to, F x) {
    if constexpr (D == DType::kF32) {
      _mm512_storeu_ps(to, x);
    } else {
      __m256i halves;
      if constexpr (D == DType::kF16) {
        halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      } else {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        const __m512i words = _mm512_mask_mov_epi32(rounded, nan, quiet);
        halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
    }
  }

  static F FirstBf16(const std::byte* from) {
    return _mm512_castsi512_ps(
        _mm512_unpacklo_epi16(_mm512_setzero_si512(), _mm512_loadu_si512(from)));
  }
  static F LastBf16(const std::byte* from) {
    return _mm512_castsi512_ps(
        _mm512_unpackhi_epi16(_mm512_setzero_si512(), _mm512_loadu_si512(from)));
  }

  [[gnu::always_inline]] static F SumsOf(F (&x)[16]) {
    // Halves of quarters, quarters; then quarters among each other.
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      x[i] = Add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                 _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] = Add(_mm512_shuffle_ps(x[2 * i], x[2 * i + 1], 0x44),
                 _mm512_shuffle_ps(x[2 * i], x[2 * i + 1], 0xee));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      x[i] = Add(_mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0x44),
                 _mm512_shuffle_f32x4(x[2 * i], x[2 * i + 1], 0xee));
    }
    return Add(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
  }
};

}  // namespace

constinit const Variant kAvx512Variant = TableOf<Vec>();

}  // namespace larder::kernels
