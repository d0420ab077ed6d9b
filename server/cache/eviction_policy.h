// EvictionPolicy: the order in which unpinned leaves go.
//
// A policy gives every block a rank; of the leaves of a tier the smallest rank goes first.
// Ranks are uint64: the top bits may name a class of leaves, the rest their age in it.
//
// Thread safety: none; the cache locks. Deterministic.
//
// Invariants a policy must keep:
//   1. Touched never lowers a rank, so a stale rank in a heap is only ever too small.
//   2. Blocks of one path touched together get ranks that do not grow with depth.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "absl/status/statusor.h"

namespace larder {

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;
  // The block was looked up or put at operation `now` (grows by one an operation).
  virtual uint64_t Touched(uint64_t rank, uint64_t now) const = 0;
  // The conversation that ended in this block is over.
  virtual uint64_t Finished(uint64_t rank) const = 0;
  // Whether the rank says so: Finished came after the last Touched.
  virtual bool IsFinished(uint64_t rank) const = 0;
};

// Least recently used. Two classes: blocks of finished conversations, then all others.
std::unique_ptr<EvictionPolicy> MakeLruPolicy();

// "lru". INVALID_ARGUMENT names the policies there are.
absl::StatusOr<std::unique_ptr<EvictionPolicy>> MakePolicy(std::string_view name);

}  // namespace larder
