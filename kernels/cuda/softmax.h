// The running softmax of one head, in base 2: scores come multiplied by log2(e), so a weight is one
// ex2 instruction.
//
// Thread safety: device code.
#pragma once

#include "kernels/cuda/numbers.h"

namespace larder::kernels::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

struct RunningSoftmax {
  float most = 0;  // largest score so far; -infinity: none was visible
  float sum = 0;   // of exp2(score - Base())

  __device__ void Clear() {
    most = NegativeInfinity();
    sum = 0;
  }
  // What exponents are taken from: 0 while nothing is visible, as -infinity - -infinity is NaN.
  __device__ float Base() const { return most == NegativeInfinity() ? 0 : most; }

  // Takes a new largest score; returns what everything so far is to be multiplied with.
  __device__ float Raise(float score) {
    const float before = most;
    most = fmaxf(most, score);
    const float factor = Exp2(before - Base());
    sum *= factor;
    return factor;
  }
  // log2 of the sum of exp2(score). -infinity: nothing visible; NaN: a visible score was.
  __device__ float LogSum() const { return Base() + Log2(sum); }
};

}  // namespace larder::kernels::cuda
