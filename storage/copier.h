// Copier: carries bytes between the GPU tier's arenas and HOST. Two kinds: threads that copy
// between arenas in shared memory (here), and a CUDA device's copy engines (copier_cuda.h).
//
// It takes no decisions: whoever hands batches over keeps within its limits, so that a job that
// somebody waits for is never behind much that nobody does.
//
// Thread safety: thread-safe. DoneFn runs on a thread of the copier's, without a lock held.
//
// Invariants:
//   1. DoneFn is called exactly once for each batch, never from inside Copy.
//   2. After DoneFn nobody reads or writes the batch's HOST memory any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"

namespace larder {

class Copier {
 public:
  enum class Direction : uint8_t { kToHost = 0, kToGpu = 1 };

  // Consecutive bytes of one rank's arena and where they are, or go to, in HOST.
  struct Piece {
    uint32_t rank = 0;
    std::byte* gpu = nullptr;  // in the arena of that rank
    std::byte* host = nullptr;
    uint64_t bytes = 0;
  };
  using Batch = std::vector<Piece>;
  using DoneFn = std::function<void(absl::Status)>;

  // What keeps it busy; more only makes the next job wait.
  struct Limits {
    int batches = 1;           // handed over and not done
    int batches_each_way = 1;  // of these, in one direction
    uint64_t batch_bytes = 0;  // of a batch of several jobs; 0: one job a batch
  };

  virtual ~Copier() = default;
  virtual Limits limits() const = 0;

  // OK, or why nothing is copied any more, until the daemon starts again.
  virtual absl::Status health() const { return absl::OkStatus(); }

  // All of a batch has arrived, or DoneFn tells why some has not.
  virtual void Copy(Direction direction, Batch batch, DoneFn done) = 0;

  // The end is near: no batch follows, and each that was handed over is done in bounded time, also
  // where a device hangs. Does not wait.
  virtual void Stop() {}
};

// Copies with CopyBlock in `threads` threads, one batch each.
std::unique_ptr<Copier> MakeThreadCopier(int threads);

}  // namespace larder
