#include "server/cache/eviction_policy.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

class LruPolicy final : public EvictionPolicy {
 public:
  uint64_t Touched(uint64_t, uint64_t now) const override { return kLive | now; }
  uint64_t Finished(uint64_t rank) const override { return rank & ~kLive; }
  bool IsFinished(uint64_t rank) const override { return (rank & kLive) == 0; }

 private:
  static constexpr uint64_t kLive = uint64_t{1} << 63;
};

}  // namespace

std::unique_ptr<EvictionPolicy> MakeLruPolicy() { return std::make_unique<LruPolicy>(); }

absl::StatusOr<std::unique_ptr<EvictionPolicy>> MakePolicy(std::string_view name) {
  if (name == "lru") return MakeLruPolicy();
  return absl::InvalidArgumentError(
      absl::StrCat("policy: \"", std::string(name), "\" given, allowed is lru"));
}

}  // namespace larder
