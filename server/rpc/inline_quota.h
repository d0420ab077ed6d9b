// InlineQuota: how many bytes of blocks may be in the messages of Puts under way, all together.
// A Put with its bytes may wait for moves, and its message stays in memory meanwhile.
//
// Thread safety: thread-safe. Its holds may outlive it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace larder {

class InlineQuota {
 public:
  // Move-only: what one Put has of it.
  class Hold {
   public:
    Hold(std::shared_ptr<std::atomic<uint64_t>> taken, uint64_t bytes)
        : taken_(std::move(taken)), bytes_(bytes) {}
    Hold(Hold&&) = default;
    Hold& operator=(Hold&&) = delete;
    ~Hold() {
      if (taken_ != nullptr) *taken_ -= bytes_;
    }

   private:
    std::shared_ptr<std::atomic<uint64_t>> taken_;  // null: moved from
    uint64_t bytes_;
  };

  explicit InlineQuota(uint64_t bytes_max) : bytes_max_(bytes_max) {}

  // RESOURCE_EXHAUSTED when that would be more than there may be.
  absl::StatusOr<Hold> Take(uint64_t bytes) {
    const uint64_t others = taken_->fetch_add(bytes);
    Hold hold(taken_, bytes);
    if (others + bytes <= bytes_max_) return hold;
    return absl::ResourceExhaustedError(
        absl::StrCat("data: ", bytes, " bytes given beside ", others,
                     " of Puts under way, allowed are ", bytes_max_, " in all"));
  }

 private:
  const uint64_t bytes_max_;
  const std::shared_ptr<std::atomic<uint64_t>> taken_ = std::make_shared<std::atomic<uint64_t>>(0);
};

}  // namespace larder
