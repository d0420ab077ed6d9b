// The kernels that work on one row at a time, over a vector type V (vector_math.h). Internal to
// kernels/.
//
// Thread safety: pure functions.
#pragma once

#include <math.h>

#include <cstdint>

#include "kernels/variant.h"
#include "kernels/vector_math.h"

namespace larder::kernels {

template <typename V>
void RmsNormRow(const RmsNormParams& params, int64_t row) {
  using F = typename V::F;
  const float* const x = params.x + row * params.x_stride;
  float* const out = params.out + row * params.out_stride;
  F sum = V::Zero();
  for (int32_t i = 0; i < params.dim; i += V::kLanes) {
    const F part = LoadFloats<V>(x + i, params.dim - i);
    sum = V::Fma(part, part, sum);
  }
  const float mean = V::SumOf(sum) / static_cast<float>(params.dim);
  const F factor = V::Set(1.0f / sqrtf(mean + params.epsilon));
  for (int32_t i = 0; i < params.dim; i += V::kLanes) {
    const int32_t count = params.dim - i;
    const F normal = V::Mul(LoadFloats<V>(x + i, count), factor);
    StoreFloats<V>(out + i, V::Mul(normal, LoadFloats<V>(params.weight + i, count)), count);
  }
}

template <typename V>
void SiluMulRow(const SiluMulParams& params, int64_t row) {
  using F = typename V::F;
  const float* const gate = params.gate + row * params.in_stride;
  const float* const up = params.up + row * params.in_stride;
  float* const out = params.out + row * params.out_stride;
  const F one = V::Set(1.0f);
  for (int32_t i = 0; i < params.dim; i += V::kLanes) {
    const int32_t count = params.dim - i;
    const F x = LoadFloats<V>(gate + i, count);
    // exp is good up to 88; from there on the quotient is 0 to float32 anyway.
    const F grown = V::Add(one, Exp<V>(V::Min(V::Sub(V::Zero(), x), V::Set(88.0f))));
    StoreFloats<V>(out + i, V::Mul(V::Div(x, grown), LoadFloats<V>(up + i, count)), count);
  }
}

template <typename V>
void RopeRow(const RopeParams& params, int64_t row) {
  float* const x = params.x + row * params.row_stride;
  for (int32_t head = 0; head < params.heads; ++head) {
    RotateHalves<V>(x + head * params.head_stride, params.cos_sin + row * params.dim, params.dim);
  }
}

template <typename V>
void MergeRow(const MergeParams& params, int64_t row) {
  using F = typename V::F;
  float most = -HUGE_VALF;
  for (int32_t part = 0; part < params.parts; ++part) {
    most = params.lses[part][row] > most ? params.lses[part][row] : most;
  }
  const bool empty = most == -HUGE_VALF;
  float sum = 0;
  for (int32_t part = 0; part < params.parts && !empty; ++part) {
    sum += V::First(Exp<V>(V::Set(params.lses[part][row] - most)));
  }
  const F total = V::Set(sum);
  for (int32_t i = 0; i < params.dim; i += V::kLanes) {
    const int32_t count = params.dim - i;
    F mean = V::Zero();
    for (int32_t part = 0; part < params.parts; ++part) {
      // A part that saw nothing has no say, whatever it holds.
      if (params.lses[part][row] == -HUGE_VALF) continue;
      const F weight = V::Div(Exp<V>(V::Set(params.lses[part][row] - most)), total);
      const float* const out = params.outs[part] + row * params.dim + i;
      mean = V::Fma(weight, LoadFloats<V>(out, count), mean);
    }
    StoreFloats<V>(params.out + row * params.dim + i, mean, count);
  }
  if (params.lse != nullptr) params.lse[row] = empty ? -HUGE_VALF : most + logf(sum);
}

}  // namespace larder::kernels
