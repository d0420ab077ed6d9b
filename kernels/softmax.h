// Scores of a row over a piece's tokens, and the weights they become. Internal to kernels/, over a
// vector type V (vector_math.h). Every function takes `tokens` of them, a multiple of kTileTokens.
//
// Thread safety: pure functions.
#pragma once

#include <math.h>

#include <cstdint>

#include "kernels/vector_math.h"

namespace larder::kernels {

// A weight is multiplied by its value's scale as zero if it is less than this, e^-59.6 of the
// piece's largest, whatever the scale is. The product might be subnormal, and each multiplication
// by such a number takes an Intel CPU 130 cycles. That is prevented for scales of 2^-40 and more;
// of smaller ones, down to the 2^-126 that quantise.h allows, products may still be subnormal:
// slow, and of fewer bits.
inline constexpr float kWeightMin = 0x1p-86f;

// Scores of the tokens that a bit of `hidden` is set for: nothing.
template <typename V>
void Hide(float* scores, uint32_t hidden) {
  for (; hidden != 0; hidden &= hidden - 1) scores[__builtin_ctz(hidden)] = -HUGE_VALF;
}

// Scores or weights times their tokens' scales; those below `least` count as zero.
template <typename V>
void MultiplyRow(float* numbers, const float* scales, int32_t tokens, float least) {
  using F = typename V::F;
  const F bound = V::Set(least);
  for (int32_t i = 0; i < tokens; i += V::kLanes) {
    const F number = V::Load(numbers + i);
    V::Store(numbers + i, V::Mul(V::ZeroBelow(number, number, bound), V::Load(scales + i)));
  }
}

// Scores to weights exp(score - most); their greatest score, and the weights' sum. Where nothing is
// seen the greatest is -infinity, and there are no weights and no sum. A score that is NaN is none
// of the greatest, which it must not hide or become, and makes the sum NaN; where all that are seen
// are NaN, the greatest is 0.
template <typename V>
void Softmax(float* scores, int32_t tokens, float& most, float& sum) {
  using F = typename V::F;
  F lanes = V::Set(-HUGE_VALF);
  F all = V::Zero();
  for (int32_t i = 0; i < tokens; i += V::kLanes) {
    const F score = V::Load(scores + i);
    lanes = V::Max(score, lanes);  // of two of which one is NaN, the second
    all = V::Add(all, score);
  }
  most = V::MaxOf(lanes);
  if (most == -HUGE_VALF) {
    if (!__builtin_isnan(V::SumOf(all))) return;
    most = 0;
  }
  const F maximum = V::Set(most);
  F sums = V::Zero();
  for (int32_t i = 0; i < tokens; i += V::kLanes) {
    const F weight = Exp<V>(V::Sub(V::Load(scores + i), maximum));
    V::Store(scores + i, weight);
    sums = V::Add(sums, weight);
  }
  sum = V::SumOf(sums);
}

}  // namespace larder::kernels
