#include "client/worker/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"

namespace larder::worker {
namespace {

constexpr double kTemperatureMax = 100;

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
constexpr uint64_t Mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58'476d'1ce4'e5b9;
  x ^= x >> 27;
  x *= 0x94d0'49bb'1331'11eb;
  return x ^ (x >> 31);
}

// Uniform in [0, 1), a pure function of what a choice may depend on (invariant 1).
double Uniform(uint64_t seed, uint64_t sample, uint64_t position) {
  constexpr uint64_t kGolden = 0x9e37'79b9'7f4a'7c15;
  const uint64_t bits = Mix(Mix(Mix(seed + kGolden) ^ (sample + kGolden)) ^ (position + kGolden));
  return static_cast<double>(bits >> 11) * 0x1.0p-53;
}

// NaN as the least, so that it is never preferred and the order below is one.
float Comparable(float logit) {
  return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
}

}  // namespace

absl::Status Validate(const SamplingOptions& options) {
  if (!(options.temperature >= 0 && options.temperature <= kTemperatureMax)) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature: ", options.temperature, "; allowed: 0 to ", kTemperatureMax));
  }
  if (!(options.top_p > 0 && options.top_p <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_p: ", options.top_p, "; allowed: above 0, at most 1"));
  }
  return absl::OkStatus();
}

uint32_t Greedy(std::span<const float> logits) {
  uint32_t best = 0;
  for (uint32_t i = 1; i < logits.size(); ++i) {
    if (Comparable(logits[i]) > Comparable(logits[best])) best = i;
  }
  return best;
}

uint32_t Sample(std::span<const float> logits, const SamplingOptions& options, uint64_t sample,
                uint64_t position) {
  const uint32_t best = Greedy(logits);
  if (options.temperature == 0 || !std::isfinite(logits[best])) return best;

  // 1. Candidates from the most likely on; only as many are put in order as are needed.
  std::vector<uint32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto likelier = [&](uint32_t a, uint32_t b) {
    const float left = Comparable(logits[a]), right = Comparable(logits[b]);
    return left != right ? left > right : a < b;
  };
  const size_t kept =
      options.top_k == 0 ? order.size() : std::min<size_t>(options.top_k, order.size());
  if (kept < order.size()) {
    std::nth_element(order.begin(), order.begin() + static_cast<ptrdiff_t>(kept), order.end(),
                     likelier);
    order.resize(kept);
  }
  std::sort(order.begin(), order.end(), likelier);

  // 2. Their weights, in f64 and in that order, so that the sum is the same everywhere.
  std::vector<double> weights(order.size());
  double sum = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    weights[i] =
        std::exp((Comparable(logits[order[i]]) - double{logits[best]}) / options.temperature);
    sum += weights[i];
  }

  // 3. The fewest that reach top_p.
  size_t allowed = 0;
  double reached = 0;
  do {
    reached += weights[allowed++];
  } while (allowed < weights.size() && reached < options.top_p * sum);

  // 4. The draw.
  double left = Uniform(options.seed, sample, position) * reached;
  for (size_t i = 0; i + 1 < allowed; ++i) {
    left -= weights[i];
    if (left < 0) return order[i];
  }
  return order[allowed - 1];
}

}  // namespace larder::worker
