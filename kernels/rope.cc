#include "kernels/rope.h"

#include <cmath>
#include <numbers>

#include "kernels/variant.h"

namespace larder::kernels {
namespace {

float Scaled(float frequency, const Llama3RopeScaling& scaling) {
  const auto original = static_cast<float>(scaling.original_max_position_embeddings);
  const auto low = static_cast<float>(scaling.low_freq_factor);
  const auto high = static_cast<float>(scaling.high_freq_factor);
  const auto factor = static_cast<float>(scaling.factor);
  const float wavelength = static_cast<float>(2 * std::numbers::pi) / frequency;
  if (wavelength > original / low) return frequency / factor;
  if (wavelength < original / high) return frequency;
  const float smooth = (original / wavelength - low) / (high - low);
  return (1 - smooth) * frequency / factor + smooth * frequency;
}

}  // namespace

std::vector<float> InverseFrequencies(const RopeConfig& config) {
  std::vector<float> frequencies(config.dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.dim);
    const auto power = static_cast<float>(std::pow(config.theta, double{exponent}));
    frequencies[i] = 1.0f / power;
    if (config.llama3) frequencies[i] = Scaled(frequencies[i], *config.llama3);
  }
  return frequencies;
}

void RopeAngles(const Cpu& cpu, std::span<const float> frequencies,
                std::span<const int32_t> positions, float* cos_sin) {
  const size_t half = frequencies.size();
  cpu.pool.ParallelFor(static_cast<int64_t>(positions.size()), [&](int64_t row, int) {
    float* const cosines = cos_sin + row * 2 * half;
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[row]) * frequencies[i];
      cosines[i] = static_cast<float>(std::cos(double{angle}));
      cosines[half + i] = static_cast<float>(std::sin(double{angle}));
    }
  });
}

void ApplyRope(const Cpu& cpu, const RopeParams& params) {
  const Variant& variant = VariantOf(cpu.isa);
  cpu.pool.ParallelFor(params.rows, [&](int64_t row, int) { variant.rope_row(params, row); });
}

}  // namespace larder::kernels
