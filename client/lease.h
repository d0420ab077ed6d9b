// Lease: a cursor on a path of the cache. It pins the blocks from the start of the prompt to
// its end, and holds writable blocks reserved past it.
//
//   positions   0 ........... end ........... end + reserved
//               readable            writable
//               Block(position)     Reserved(position)
//
// A typical worker: Prefetch, read Block(0..end), Reserve, write, Put, and let it go.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. Only this object moves the lease's end. After an error nothing has changed on either
//      side, except after DEADLINE_EXCEEDED and UNAVAILABLE, where the daemon may be ahead:
//      Truncate(end()) brings the two together again, reserved blocks are then gone.
//   2. Block and Reserved give memory only while the session is alive.
//   3. Destruction releases, without waiting for the answer: the session's next call, or its
//      end, does that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/block_place.h"
#include "client/session.h"
#include "larder/v1/kv_cache.pb.h"
#include "larder/v1/types.pb.h"

namespace larder {
inline namespace client {

class Lease {
 public:
  Lease(Lease&&) noexcept;
  Lease& operator=(Lease&&) noexcept;  // releases what was held, as destruction does
  ~Lease();

  // --- What it holds -------------------------------------------------------------------

  uint64_t id() const { return id_; }
  uint32_t end() const { return end_; }  // blocks
  uint32_t reserved() const { return static_cast<uint32_t>(places_.size()) - end_; }
  uint32_t block_tokens() const { return block_tokens_; }
  uint64_t block_bytes() const { return block_bytes_; }  // of one shard's part
  uint32_t shards() const { return shards_; }
  // Of all positions: `end()` readable ones, then the reserved ones.
  std::span<const BlockPlace> places() const { return places_; }
  // What the last lookup said about bringing the lower tiers' part up.
  const v1::RestoreEstimate& restore() const { return restore_; }

  // The same of positions [begin, end), as runs: for the members of a group (group_member.h).
  // OUT_OF_RANGE unless begin <= end <= places().size().
  absl::StatusOr<std::vector<v1::Run>> Runs(uint32_t begin, uint32_t end) const;

  // One block's bytes, or of a model of several shards rank `rank`'s part of them. OUT_OF_RANGE
  // for a position that is not readable (or not reserved) or a rank that is no shard's,
  // FAILED_PRECONDITION for a block that must be prefetched first or whose arena is not
  // mapped, UNAVAILABLE when the session is lost.
  absl::StatusOr<std::span<const std::byte>> Block(uint32_t position, uint32_t rank = 0) const;
  absl::StatusOr<std::span<std::byte>> Reserved(uint32_t position, uint32_t rank = 0) const;
  // The same of a block in a device's memory, readable or reserved: its address for kernels there
  // (DeviceArena). Errors as those of Block and Session::Device.
  absl::StatusOr<uint64_t> DeviceAddress(uint32_t position, uint32_t rank = 0) const;

  // False once the session is lost: memory of a device may no longer be used, whatever was mapped
  // stays (session.h).
  bool Alive() const { return CheckHeld().ok(); }

  // --- Calls; their errors are those of kv_cache.proto ---------------------------------

  // Looks further: `tokens` are those past the end. FAILED_PRECONDITION while blocks are
  // reserved. Answers how many blocks were added.
  absl::StatusOr<uint32_t> Extend(std::span<const uint32_t> tokens,
                                  const LookupOptions& options = {});
  // Brings blocks up; `places` follow. `on_event` sees each run as it becomes readable.
  absl::StatusOr<PrefetchResult> Prefetch(const PrefetchOptions& options = {},
                                          const PrefetchCallback& on_event = {});
  // Writable blocks at [end, end + count). Asking again gives the same blocks.
  absl::Status Reserve(uint32_t count, v1::Tier tier = v1::TIER_UNSPECIFIED);
  // As many as there is room for, at most `count`: in the highest tier, else in HOST, else
  // half as many. Past a block that is not in GPU only in HOST: GPU blocks are prefix-closed;
  // past blocks that are reserved already only in their tier. With `only`, in no other tier than
  // that. Answers how many are reserved now, of at most `count`; RESOURCE_EXHAUSTED when not even
  // one.
  absl::StatusOr<uint32_t> ReserveUpTo(uint32_t count, v1::Tier only = v1::TIER_UNSPECIFIED);
  // Publishes the first tokens.size() / block_tokens reserved blocks. Writes must be complete.
  absl::StatusOr<v1::LeaseState> Put(std::span<const uint32_t> tokens);
  // The same with the bytes in the message, block after block, each with the parts of all
  // shards in rank order; needs no reserved blocks.
  absl::StatusOr<v1::LeaseState> PutInline(std::span<const uint32_t> tokens,
                                           std::span<const std::byte> data);
  // Moves the end back; reserved blocks are freed.
  absl::StatusOr<v1::LeaseState> Truncate(uint32_t position);
  // A second cursor on the same published path.
  absl::StatusOr<Lease> Fork() const;
  // Waits until all is durable; infinite: the client's call timeout.
  absl::StatusOr<v1::LeaseState> Flush(absl::Duration timeout = absl::InfiniteDuration());
  // Bytes over the wire, from block `position`, at most `count` (0: all).
  absl::Status Download(uint32_t position, uint32_t count, absl::Duration timeout,
                        const DownloadCallback& on_chunk) const;
  // Lets go now and says how it went; the lease is empty afterwards whatever the answer.
  // `session_over`: the conversation is finished, its tail may age first.
  absl::Status Release(bool session_over = false);

 private:
  friend class Session;
  Lease(std::shared_ptr<SessionState> state, const v1::Model& model);
  Lease(std::shared_ptr<SessionState> state, const Lease& forked_from, uint64_t id);

  absl::Status LookupFurther(std::span<const uint32_t> tokens, const LookupOptions& options);
  absl::Status CheckRank(uint32_t rank) const;
  absl::StatusOr<std::span<std::byte>> At(uint32_t position, uint32_t rank) const;
  absl::Status TakeRun(const v1::Run& run);
  absl::Status CheckHeld() const;
  void Drop();
  absl::StatusOr<v1::LeaseState> TakeState(absl::StatusOr<v1::LeaseState> answer);

  std::shared_ptr<SessionState> state_;  // null: nothing is held
  // Open as long as somebody may read this lease's blocks, also when the session is lost.
  std::shared_ptr<DeviceArenas> devices_;
  uint64_t model_id_ = 0;
  uint64_t block_bytes_ = 0;
  uint32_t shards_ = 1;
  uint32_t block_tokens_ = 0;
  uint64_t id_ = 0;
  uint32_t end_ = 0;
  std::vector<BlockPlace> places_;
  v1::RestoreEstimate restore_;
};

}  // namespace client
}  // namespace larder
