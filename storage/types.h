// The vocabulary of every layer above: tiers, slots, block keys, clocks.
//
// Thread safety: all types here are values.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "absl/time/time.h"

namespace larder {

// A bounded set of slots. The order is the order of reading preference.
enum class Tier : uint8_t { kGpu = 0, kHost = 1, kNvme = 2 };
inline constexpr int kTierCount = 3;
inline constexpr std::array<Tier, kTierCount> kTiers = {Tier::kGpu, Tier::kHost, Tier::kNvme};

constexpr std::string_view TierName(Tier tier) {
  constexpr std::array<std::string_view, kTierCount> kNames = {"GPU", "HOST", "NVME"};
  return kNames[static_cast<int>(tier)];
}
constexpr int Index(Tier tier) { return static_cast<int>(tier); }

// The place of one block in one tier, and at the same time its address: slot n starts
// at byte (n - 1) * 4096 of the tier's arena or slot file. 0 means "no slot". 32 bits
// therefore reach 16 TiB a tier.
inline constexpr uint64_t kSlotGranule = 4096;

class Slot {
 public:
  constexpr Slot() = default;
  constexpr explicit Slot(uint32_t number) : number_(number) {}
  static constexpr Slot AtOffset(uint64_t offset_bytes) {
    return Slot(static_cast<uint32_t>(offset_bytes / kSlotGranule + 1));
  }
  constexpr uint32_t number() const { return number_; }
  constexpr uint64_t offset() const { return (uint64_t{number_} - 1) * kSlotGranule; }
  constexpr explicit operator bool() const { return number_ != 0; }
  friend constexpr auto operator<=>(Slot, Slot) = default;
  template <typename H>
  friend H AbslHashValue(H h, Slot s) {
    return H::combine(std::move(h), s.number_);
  }

 private:
  uint32_t number_ = 0;
};

struct SlotRef {
  Tier tier = Tier::kGpu;
  Slot slot;
  friend constexpr auto operator<=>(const SlotRef&, const SlotRef&) = default;
  template <typename H>
  friend H AbslHashValue(H h, const SlotRef& r) {
    return H::combine(std::move(h), r.tier, r.slot);
  }
};

// The chained name of a block: SHA-256(parent's key || the block's tokens as LE u32).
// The parent of a first block is the model's fingerprint. Equal keys mean equal
// tokens, equal history and equal model.
struct BlockKey {
  std::array<uint8_t, 32> bytes{};
  friend constexpr auto operator<=>(const BlockKey&, const BlockKey&) = default;
  // 64 of its bits; uniform, because the key is a SHA-256.
  uint64_t Prefix64() const {
    uint64_t v;
    std::memcpy(&v, bytes.data(), sizeof(v));
    return v;
  }
  // 32 of its bits: enough to tell apart the blocks that a slot holds one after the other.
  uint32_t Tag() const { return static_cast<uint32_t>(Prefix64()); }
  template <typename H>
  friend H AbslHashValue(H h, const BlockKey& k) {
    return H::combine(std::move(h), k.Prefix64());
  }
};

// Monotonic time. Injected, so that a simulation can own it.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() const = 0;
};

}  // namespace larder
