#include "client/worker/prefill_rate.h"

#include <algorithm>

namespace larder::worker {
namespace {

// The part of each new measurement in `scale`: ten steps forget most of what was before.
constexpr double kNew = 0.2;

// Sum of the positions in [begin, end).
double PositionSum(uint32_t begin, uint32_t end) {
  const double count = double{1.0} * end - begin;
  return count * (double{1.0} * begin + end - 1) / 2;
}

}  // namespace

// With t0 = n a + b S(0, n) and t1 = n a + b S(far, far + n), S being the sum of the positions,
// t1 - t0 = b n far. A machine that was disturbed during the first chunk gives no slope.
PrefillRate::PrefillRate(const Measured& measured) {
  const double count = measured.tokens;
  const double start = absl::ToDoubleSeconds(measured.at_start);
  const double far = absl::ToDoubleSeconds(measured.far);
  if (measured.far_begin > 0) {
    per_position_seconds_ = std::max(0.0, (far - start) / (count * measured.far_begin));
  }
  per_token_seconds_ = (start - per_position_seconds_ * PositionSum(0, measured.tokens)) / count;
  if (per_token_seconds_ <= 0) {
    per_token_seconds_ = std::max(start / count, 1e-9);
    per_position_seconds_ = 0;
  }
}

void PrefillRate::Observe(uint32_t begin, uint32_t end, absl::Duration took) {
  if (!known() || end <= begin) return;
  const double count = double{1.0} * end - begin;
  const double expected =
      per_token_seconds_ * count + per_position_seconds_ * PositionSum(begin, end);
  scale_ += kNew * (absl::ToDoubleSeconds(took) / expected - scale_);
}

absl::Duration PrefillRate::Estimate(uint32_t begin, uint32_t end) const {
  if (end <= begin) return absl::ZeroDuration();
  const double count = double{1.0} * end - begin;
  return absl::Seconds(
      scale_ * (per_token_seconds_ * count + per_position_seconds_ * PositionSum(begin, end)));
}

double PrefillRate::TokensPerSecond(uint32_t tokens) const {
  const absl::Duration took = Estimate(0, tokens);
  return took > absl::ZeroDuration() ? tokens / absl::ToDoubleSeconds(took) : 0;
}

}  // namespace larder::worker
