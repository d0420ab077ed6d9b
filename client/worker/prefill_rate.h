// PrefillRate: how long prefilling takes on this machine, by position.
//
//   seconds of the token at position p = scale * (per_token + per_token_and_position * p)
//
// The first term is the matrices', the second is attention's, which reads everything before.
// Both are measured once, at start; `scale` follows what steps really took, so a busy machine
// makes restoring pay earlier.
//
// Thread safety: a value.
#pragma once

#include <cstdint>

#include "absl/time/time.h"

namespace larder::worker {

class PrefillRate {
 public:
  // Two chunks' measured times, of 1 or more tokens each. `far_begin` 0: there is no second one.
  struct Measured {
    uint32_t tokens = 0;
    absl::Duration at_start;  // positions [0, tokens)
    uint32_t far_begin = 0;
    absl::Duration far;  // positions [far_begin, far_begin + tokens)
  };

  PrefillRate() = default;  // unknown: every estimate is zero
  explicit PrefillRate(const Measured& measured);

  // Prefilling [begin, end) took `took`.
  void Observe(uint32_t begin, uint32_t end, absl::Duration took);

  bool known() const { return per_token_seconds_ > 0; }
  absl::Duration Estimate(uint32_t begin, uint32_t end) const;  // of tokens [begin, end)
  // Of a whole prompt; 0: unknown.
  double TokensPerSecond(uint32_t tokens) const;

 private:
  double per_token_seconds_ = 0;
  double per_position_seconds_ = 0;
  double scale_ = 1;
};

}  // namespace larder::worker
