// Moves: bounded jobs that copy one block from a slot of one tier to a slot of another.
//
// The asker owns both slots until the completion is delivered, whatever happens to
// whoever wanted the block. A mover knows no tokens and takes no decisions.
//
// Thread safety: implementations are thread-safe unless they say otherwise.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "storage/types.h"

namespace larder {

using MoveId = uint64_t;

// Who waits. A waiting worker's moves are started before any background move.
enum class MoveClass : uint8_t { kWaiting = 0, kBackground = 1 };

// What the NVMe tier records beside a payload, and checks when it reads it back.
struct BlockRecord {
  BlockKey key;
  BlockKey parent_key;  // the model's fingerprint for a first block
  uint64_t model_id = 0;
  uint32_t depth = 0;  // blocks before this one on its path
  // When the record was written: wall clock, Unix seconds. Set by the tier and not compared;
  // it orders what is found at a start by age.
  uint64_t written_at_s = 0;
};

struct MoveJob {
  MoveId id = 0;
  SlotRef from;
  SlotRef to;
  uint32_t bytes = 0;  // of the whole block; the same in every tier
  // Equal parts the block consists of, in rank order: one behind the other in HOST and NVME; in
  // GPU the part of rank r lies at the slot's offset in the memory of rank r.
  uint32_t shards = 1;
  MoveClass move_class = MoveClass::kBackground;
  BlockRecord record;  // meaningful when either end is NVME
};

class Mover {
 public:
  // Called once for each accepted job, from any thread but never from inside Submit.
  // OK: the bytes are in `to` and, for NVME, durable. DATA_LOSS: what was read is not
  // the block that was asked for (its record is already deleted). Anything else: the
  // copy failed, `to` holds nothing, and `from` may still be good.
  using DoneFn = std::function<void(MoveId, absl::Status)>;

  virtual ~Mover() = default;

  // Queues a job. Never blocks and never waits for I/O. RESOURCE_EXHAUSTED when the
  // queue of this tier pair and class is full, UNAVAILABLE when the tier is degraded;
  // then nothing was queued and DoneFn is not called.
  virtual absl::Status Submit(const MoveJob& job) = 0;

  // A worker now waits for this move: puts it into the waiting class. Unknown ids and
  // moves that have started are ignored.
  virtual void Raise(MoveId id) = 0;

  // Forgets the durable record of an NVME slot if its key still has this tag: another
  // thread may have written the slot anew. Asynchronous, ordered before any later write to
  // that slot. Without it a dropped block may come back after a restart, which is harmless.
  virtual void Erase(Slot nvme_slot, uint32_t key_tag) = 0;
};

}  // namespace larder
