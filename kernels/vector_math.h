// What rows of numbers have in common, over a vector type V. Internal to kernels/.
//
// V is a struct of static functions on V::F, a register of V::kLanes floats:
//   Zero, Set (all lanes), Load, Store, First (lane 0)
//   Add, Sub, Mul, Div, Max and Min (b where either is a NaN), Fma (a * b + c), Fnma (c - a * b)
//   Round (to integers), Scale (x * 2^n for integral n), ZeroBelow (0 where x < bound, else y)
//   SumOf, MaxOf (over the lanes, in a fixed order)
//   LoadAs<DType> (kLanes numbers of storage; of one-byte storage kLanes codes, those of
//     e4m3 in units of kE4m3Unit)
//   StoreAs<DType> (kLanes numbers to storage that is not quantised, rounded to nearest even)
//   FirstBf16, LastBf16 (of 2 * kLanes bfloat16: the first four of every 8, and the last four)
//   LoadE4m3 (of kValueVecs * kLanes codes: those at even places, then those at odd ones)
//   SumsOf (of kLanes registers: lane i is the sum over the lanes of the i-th; every sum in the
//     same order)
// and V::kValueVecs, the registers of values to weigh at once, and V::DirectRows(DType): for up to
// so many rows numbers are converted anew for every four, for more once for all.
//
// Everything here is a template over V: its instances stay inside the variant's file, as V is in
// an unnamed namespace there (variant.h, rule 1).
//
// Thread safety: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/kv_layout.h"

namespace larder::kernels {

// e^x for x <= 88, within 2 units of the last place; exactly 0 below -87 and for -infinity; a NaN
// stays one. Range reduction to |r| <= ln(2) / 2 and a polynomial of degree 6 (Cephes, expf).
template <typename V>
typename V::F Exp(typename V::F x) {
  using F = typename V::F;
  const F bound = V::Set(-87.0f);
  const F inside = V::Max(bound, x);
  const F n = V::Round(V::Mul(inside, V::Set(1.44269504088896341f)));
  F r = V::Fnma(n, V::Set(0.693359375f), inside);
  r = V::Fnma(n, V::Set(-2.12194440e-4f), r);
  F p = V::Set(1.9875691500e-4f);
  p = V::Fma(p, r, V::Set(1.3981999507e-3f));
  p = V::Fma(p, r, V::Set(8.3334519073e-3f));
  p = V::Fma(p, r, V::Set(4.1665795894e-2f));
  p = V::Fma(p, r, V::Set(1.6666665459e-1f));
  p = V::Fma(p, r, V::Set(5.0000001201e-1f));
  p = V::Fma(p, V::Mul(r, r), V::Add(r, V::Set(1.0f)));
  return V::ZeroBelow(V::Scale(p, n), x, bound);
}

template <DType D>
inline constexpr int kBytes = BytesOf(D);

// What loaded codes of e4m3 are counted in: they are read as float16, whose exponent is 8 more.
inline constexpr float kE4m3Unit = 256;

// The first `count` numbers of storage, zeros in the lanes beyond; reads nothing past them.
template <typename V, DType D>
typename V::F LoadSome(const std::byte* from, int32_t count) {
  if (count >= V::kLanes) return V::template LoadAs<D>(from);
  alignas(64) std::byte whole[V::kLanes * kBytes<D>] = {};
  std::memcpy(whole, from, static_cast<size_t>(count) * kBytes<D>);
  return V::template LoadAs<D>(whole);
}

// The first `count` lanes to storage; writes nothing past them.
template <typename V, DType D>
void StoreSome(std::byte* to, typename V::F x, int32_t count) {
  if (count >= V::kLanes) return V::template StoreAs<D>(to, x);
  alignas(64) std::byte whole[V::kLanes * kBytes<D>];
  V::template StoreAs<D>(whole, x);
  std::memcpy(to, whole, static_cast<size_t>(count) * kBytes<D>);
}

// Split order: every whole run of kSplitVecs vectors of such storage is loaded as the first
// kSplitWidth of every 2 * kSplitWidth numbers and then the others, which takes fewer instructions
// than their own order. What is left over after the last run is as it was.
template <typename V, DType D>
inline constexpr int kSplitVecs = D == DType::kBf16     ? 2
                                  : D == DType::kF8E4M3 ? V::kValueVecs
                                                        : 1;  // not split
template <DType D>
inline constexpr int kSplitWidth = D == DType::kBf16 ? 4 : 1;

// The n-th of kOf vectors of storage; of bfloat16 pairs are split.
template <typename V, DType D, int kOf>
typename V::F LoadVec(const std::byte* from, int n) {
  static_assert(kOf == 1 || kOf % 2 == 0);
  if constexpr (D == DType::kBf16 && kOf > 1) {
    const std::byte* const pair = from + n / 2 * 2 * V::kLanes * kBytes<D>;
    return n % 2 == 0 ? V::FirstBf16(pair) : V::LastBf16(pair);
  } else {
    return V::template LoadAs<D>(from + n * V::kLanes * kBytes<D>);
  }
}

// All N vectors of storage, split if they are whole runs.
template <typename V, DType D, int N>
[[gnu::always_inline]] inline void LoadVecs(const std::byte* from, typename V::F (&to)[N]) {
  if constexpr (D == DType::kF8E4M3 && N == V::kValueVecs) {
    V::LoadE4m3(from, to);
  } else {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) to[n] = LoadVec<V, D, N>(from, n);
  }
}

template <typename V>
typename V::F LoadFloats(const float* from, int32_t count) {
  return LoadSome<V, DType::kF32>(reinterpret_cast<const std::byte*>(from), count);
}
template <typename V>
void StoreFloats(float* to, typename V::F x, int32_t count) {
  StoreSome<V, DType::kF32>(reinterpret_cast<std::byte*>(to), x, count);
}

template <typename V, DType D>
void LoadRowAs(const std::byte* from, float* to, int32_t count) {
  for (int32_t i = 0; i < count; i += V::kLanes) {
    StoreFloats<V>(to + i, LoadSome<V, D>(from + i * kBytes<D>, count - i), count - i);
  }
}

// `count` numbers of storage as float32.
template <typename V>
void LoadRow(DType dtype, const std::byte* from, float* to, int32_t count) {
  if (dtype == DType::kF32) return LoadRowAs<V, DType::kF32>(from, to, count);
  if (dtype == DType::kF16) return LoadRowAs<V, DType::kF16>(from, to, count);
  LoadRowAs<V, DType::kBf16>(from, to, count);
}

template <typename V, DType D>
void StoreRowAs(const float* from, std::byte* to, int32_t count) {
  for (int32_t i = 0; i < count; i += V::kLanes) {
    StoreSome<V, D>(to + i * kBytes<D>, LoadFloats<V>(from + i, count - i), count - i);
  }
}

// `count` floats to storage.
template <typename V>
void StoreRow(DType dtype, const float* from, std::byte* to, int32_t count) {
  if (dtype == DType::kF32) return StoreRowAs<V, DType::kF32>(from, to, count);
  if (dtype == DType::kF16) return StoreRowAs<V, DType::kF16>(from, to, count);
  StoreRowAs<V, DType::kBf16>(from, to, count);
}

// Calls move(in order, in split order) with where each run of kSplitWidth<D> floats lies in a row of
// `count`. The number of floats that are in split order; those behind them are not.
template <typename V, DType D, typename Move>
int32_t OverSplitRuns(int32_t count, const Move& move) {
  constexpr int kVecs = kSplitVecs<V, D>;
  constexpr int kHalf = kVecs * V::kLanes / 2;
  constexpr int kWidth = kSplitWidth<D>;
  int32_t i = 0;
  if (kVecs == 1) return i;
  for (; i + 2 * kHalf <= count; i += 2 * kHalf) {
    for (int n = 0; n < kHalf; n += kWidth) {
      move(i + 2 * n, i + n);
      move(i + 2 * n + kWidth, i + kHalf + n);
    }
  }
  return i;
}

// `from` [count] to the split order of D, and zeros up to a whole vector.
template <typename V, DType D>
void SplitRowAs(const float* from, float* to, int32_t count) {
  int32_t i = OverSplitRuns<V, D>(count, [=](int32_t in_order, int32_t split) {
    std::memcpy(to + split, from + in_order, sizeof(float) * kSplitWidth<D>);
  });
  for (; i < count; i += V::kLanes) V::Store(to + i, LoadFloats<V>(from + i, count - i));
}
template <typename V>
void SplitRow(DType dtype, const float* from, float* to, int32_t count) {
  if (dtype == DType::kBf16) return SplitRowAs<V, DType::kBf16>(from, to, count);
  if (dtype == DType::kF8E4M3) return SplitRowAs<V, DType::kF8E4M3>(from, to, count);
  SplitRowAs<V, DType::kF32>(from, to, count);
}

// SplitRow's inverse, without its zeros.
template <typename V, DType D>
void JoinRowAs(const float* from, float* to, int32_t count) {
  const int32_t i = OverSplitRuns<V, D>(count, [=](int32_t in_order, int32_t split) {
    std::memcpy(to + in_order, from + split, sizeof(float) * kSplitWidth<D>);
  });
  std::memcpy(to + i, from + i, sizeof(float) * static_cast<size_t>(count - i));
}
template <typename V>
void JoinRow(DType dtype, const float* from, float* to, int32_t count) {
  if (dtype == DType::kBf16) return JoinRowAs<V, DType::kBf16>(from, to, count);
  if (dtype == DType::kF8E4M3) return JoinRowAs<V, DType::kF8E4M3>(from, to, count);
  JoinRowAs<V, DType::kF32>(from, to, count);
}

template <typename V, DType D>
void StageRowAs(bool split, const std::byte* from, float* to, int32_t count) {
  constexpr int kVecs = kSplitVecs<V, D>;
  int32_t i = 0;
  for (; split && i + kVecs * V::kLanes <= count; i += kVecs * V::kLanes) {
    typename V::F numbers[kVecs];
    LoadVecs<V, D>(from + i * kBytes<D>, numbers);
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) V::Store(to + i + n * V::kLanes, numbers[n]);
  }
  for (; i < count; i += V::kLanes) {
    V::Store(to + i, LoadSome<V, D>(from + i * kBytes<D>, count - i));
  }
}

// `count` numbers of storage as float32, in the order of their storage type or in their own, and
// zeros up to a whole vector. Codes without their scale.
template <typename V>
void StageRow(DType dtype, bool split, const std::byte* from, float* to, int32_t count) {
  if (dtype == DType::kF32) return StageRowAs<V, DType::kF32>(split, from, to, count);
  if (dtype == DType::kF16) return StageRowAs<V, DType::kF16>(split, from, to, count);
  if (dtype == DType::kBf16) return StageRowAs<V, DType::kBf16>(split, from, to, count);
  if (dtype == DType::kI8) return StageRowAs<V, DType::kI8>(split, from, to, count);
  StageRowAs<V, DType::kF8E4M3>(split, from, to, count);
}

// rope.h's formula for one head: x [dim], cos_sin [2][dim / 2].
template <typename V>
void RotateHalves(float* x, const float* cos_sin, int32_t dim) {
  const int32_t half = dim / 2;
  for (int32_t i = 0; i < half; i += V::kLanes) {
    const int32_t count = half - i;
    const typename V::F cosine = LoadFloats<V>(cos_sin + i, count);
    const typename V::F sine = LoadFloats<V>(cos_sin + half + i, count);
    const typename V::F a = LoadFloats<V>(x + i, count);
    const typename V::F b = LoadFloats<V>(x + half + i, count);
    StoreFloats<V>(x + i, V::Fnma(b, sine, V::Mul(a, cosine)), count);
    StoreFloats<V>(x + half + i, V::Fma(a, sine, V::Mul(b, cosine)), count);
  }
}

}  // namespace larder::kernels
