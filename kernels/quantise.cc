#include "kernels/quantise.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace larder::kernels {

float QuantiseRow(DType dtype, const float* from, std::byte* codes, int32_t count) {
  float largest = 0;
  bool finite = true;
  for (int32_t i = 0; i < count; ++i) {
    const float magnitude = std::abs(from[i]);
    finite &= magnitude <= std::numeric_limits<float>::max();
    largest = std::max(largest, magnitude);
  }
  const float scale = ScaleFrom(dtype, finite ? largest : std::numeric_limits<float>::quiet_NaN());
  for (int32_t i = 0; i < count; ++i) codes[i] = std::byte{Quantised(dtype, from[i], scale)};
  return scale;
}

}  // namespace larder::kernels
