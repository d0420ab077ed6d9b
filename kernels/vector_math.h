// What rows of numbers have in common, over a vector type V. Internal to kernels/.
//
// V is a struct of static functions on V::F, a register of V::kLanes floats:
//   Zero, Set (all lanes), Load, Store, First (lane 0)
//   Add, Sub, Mul, Div, Max and Min (b where either is a NaN), Fma (a * b + c), Fnma (c - a * b)
//   Round (to integers), Scale (x * 2^n for integral n), ZeroBelow (0 where x < bound, else y)
//   SumOf, MaxOf (over the lanes, in a fixed order)
//   LoadAs<DType> (kLanes numbers of storage; of one-byte storage kLanes codes)
//   StoreAs<DType> (kLanes numbers to storage that is not quantised, rounded to nearest even)
//   FirstBf16, LastBf16 (of 2 * kLanes bfloat16: the first four of every 8, and the last four)
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

// The n-th of kOf vectors of storage. Two of bfloat16 are split, which takes an instruction a
// vector where widening a half takes two.
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

// Split order, which is what LoadVec makes of a row of bfloat16: of every whole run of 2 * kLanes
// numbers first the first four of every 8, then the last four; what is left over as it was.
template <typename V>
int32_t SplitCount(int32_t count) {
  return count / (2 * V::kLanes) * 2 * V::kLanes;
}

// `from` [count] to split order, and zeros up to a whole vector.
template <typename V>
void SplitRow(const float* from, float* to, int32_t count) {
  const int32_t split = SplitCount<V>(count);
  for (int32_t run = 0; run < split; run += 2 * V::kLanes) {
    for (int32_t i = 0; i < V::kLanes; i += 4) {
      std::memcpy(to + run + i, from + run + 2 * i, sizeof(float) * 4);
      std::memcpy(to + run + V::kLanes + i, from + run + 2 * i + 4, sizeof(float) * 4);
    }
  }
  for (int32_t i = split; i < count; i += V::kLanes) {
    V::Store(to + i, LoadFloats<V>(from + i, count - i));
  }
}

// SplitRow's inverse, without its zeros.
template <typename V>
void JoinRow(const float* from, float* to, int32_t count) {
  const int32_t split = SplitCount<V>(count);
  for (int32_t run = 0; run < split; run += 2 * V::kLanes) {
    for (int32_t i = 0; i < V::kLanes; i += 4) {
      std::memcpy(to + run + 2 * i, from + run + i, sizeof(float) * 4);
      std::memcpy(to + run + 2 * i + 4, from + run + V::kLanes + i, sizeof(float) * 4);
    }
  }
  std::memcpy(to + split, from + split, sizeof(float) * static_cast<size_t>(count - split));
}

template <typename V, DType D>
void StageRowAs(bool split, const std::byte* from, float* to, int32_t count) {
  int32_t i = 0;
  if (split) {
    for (const int32_t end = SplitCount<V>(count); i < end; i += 2 * V::kLanes) {
      V::Store(to + i, LoadVec<V, D, 2>(from + i * kBytes<D>, 0));
      V::Store(to + i + V::kLanes, LoadVec<V, D, 2>(from + i * kBytes<D>, 1));
    }
  }
  for (; i < count; i += V::kLanes) {
    V::Store(to + i, LoadSome<V, D>(from + i * kBytes<D>, count - i));
  }
}

// `count` numbers of storage as float32, split or as they are, and zeros up to a whole vector.
template <typename V>
void StageRow(DType dtype, bool split, const std::byte* from, float* to, int32_t count) {
  if (dtype == DType::kF32) return StageRowAs<V, DType::kF32>(split, from, to, count);
  if (dtype == DType::kF16) return StageRowAs<V, DType::kF16>(split, from, to, count);
  StageRowAs<V, DType::kBf16>(split, from, to, count);
}

// The numbers of `count` codes as float32: each product is rounded once. Zeros up to a whole
// vector, or NaN if the scale is.
template <typename V, DType D>
void StageCodes(const std::byte* from, float scale, float* to, int32_t count) {
  const typename V::F factor = V::Set(scale);
  for (int32_t i = 0; i < count; i += V::kLanes) {
    V::Store(to + i, V::Mul(factor, LoadSome<V, D>(from + i, count - i)));
  }
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
