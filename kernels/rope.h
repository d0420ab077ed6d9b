// Rotary position embedding, in the order of Hugging Face's Llama ("rotate half"): number i of a
// head is paired with number i + dim / 2.
//
//   x'[i]           = x[i] cos(a_i) - x[i + dim/2] sin(a_i)
//   x'[i + dim/2]   = x[i + dim/2] cos(a_i) + x[i] sin(a_i)        a_i = position * f_i
//
// Angles are computed once a forward pass (RopeAngles) and applied in every layer (ApplyRope).
//
// Thread safety: calls share nothing but what they are given. A row's result depends on that row
// only.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/cpu.h"

namespace larder::kernels {

// "rope_type": "llama3" of a model's configuration, fields by their names there.
struct Llama3RopeScaling {
  double factor = 8;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_max_position_embeddings = 8192;
};

struct RopeConfig {
  int32_t dim = 0;        // rotated numbers of a head, even
  double theta = 10'000;  // "rope_theta"
  std::optional<Llama3RopeScaling> llama3;
};

// f_i = theta^(-2i / dim), [dim / 2]; with llama3, wavelengths above original / low_freq_factor are
// stretched by factor, those below original / high_freq_factor kept, those between blended. In
// float32 steps like transformers' modeling_rope_utils.py, so that angles are those that models
// were trained with.
std::vector<float> InverseFrequencies(const RopeConfig& config);

// cos and sin of position * f_i, the product rounded to float32 as Hugging Face does.
//   positions [rows]; cos_sin [rows][2][frequencies.size()], written: cosines, then sines
void RopeAngles(const Cpu& cpu, std::span<const float> frequencies,
                std::span<const int32_t> positions, float* cos_sin);

struct RopeParams {
  float* x = nullptr;  // [rows][heads][>= dim], rotated in place; the first rotated number
  int64_t rows = 0;
  int64_t row_stride = 0;  // floats from a row to the next
  int32_t heads = 0;
  int64_t head_stride = 0;         // floats from a head to the next
  int32_t dim = 0;                 // rotated numbers of a head, even
  const float* cos_sin = nullptr;  // [rows][2][dim / 2], see RopeAngles
};
void ApplyRope(const Cpu& cpu, const RopeParams& params);

}  // namespace larder::kernels
