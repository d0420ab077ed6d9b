#include "server/rpc/steps.h"

#include <utility>

namespace larder {

void Steps::Signal(uint32_t bits) {
  const std::shared_ptr<Steps> alive = shared_from_this();
  {
    absl::MutexLock lock(&mu_);
    signals_ |= bits;
    if (stepping_) return;
    stepping_ = true;
  }
  while (true) {
    uint32_t signals;
    {
      absl::MutexLock lock(&mu_);
      signals = std::exchange(signals_, 0);
      if (signals == 0) {
        stepping_ = false;
        return;
      }
    }
    Step(signals);
  }
}

}  // namespace larder
