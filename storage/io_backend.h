// IoBackend: positional reads and writes of one file, and its barrier.
//
// Thread safety: implementations are thread-safe.
//
// Invariants:
//   1. DoneFn is called exactly once an operation, from a thread of the backend's, never from
//      inside Read or Write. It must not block: there may be only one such thread.
//   2. Of the operations that wait, reads start before writes, and beside reads few bytes of
//      writes are under way (storage/io_queue.h).
//   3. No byte outside of the given span is read or written, whatever its alignment.
//   4. The destructor completes every operation that was accepted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/unique_fd.h"

namespace larder {

class IoBackend {
 public:
  using DoneFn = std::function<void(absl::Status)>;

  virtual ~IoBackend() = default;

  // Reads exactly to.size() bytes at `offset`, a multiple of 4096. UNAVAILABLE with the
  // error's text and number when the device fails; DATA_LOSS when the file ends before.
  // A `to` that starts at a multiple of 4096 is read without a bounce copy.
  virtual void Read(uint64_t offset, std::span<std::byte> to, DoneFn done) = 0;

  // Writes the bytes at `offset`, a multiple of 4096; up to the next multiple of 4096 the
  // file then holds zeros. Not durable before Sync. UNAVAILABLE as above.
  virtual void Write(uint64_t offset, std::span<const std::byte> from, DoneFn done) = 0;

  // Makes every write durable that completed before the call. Blocks.
  virtual absl::Status Sync() = 0;
};

// The ways to do it, best first.
enum class IoWay { kUringRegistered, kUring, kThreads };

struct IoOptions {
  bool direct = false;               // the file was opened with O_DIRECT
  int threads = 4;                   // of IoWay::kThreads
  std::string name = {};             // of the file, for messages
  std::span<std::byte> memory = {};  // where most blocks lie; outlives the backend
  IoWay best = IoWay::kUringRegistered;
};

struct OpenedIo {
  std::unique_ptr<IoBackend> io;
  std::string how;  // "io_uring, registered buffers", or less and what was in the way
};

// The best way that this kernel allows, from options.best on:
//   kUringRegistered  io_uring; blocks in `memory` need no work of the kernel's for their pages.
//                     Not where the memlock limit is lower than `memory`.
//   kUring            the same without. Not where seccomp or a sysctl forbids io_uring.
//   kThreads          pread and pwrite in a few threads: works everywhere.
OpenedIo OpenIo(UniqueFd file, const IoOptions& options);

// The first two. Takes `file` over when it succeeds. UNAVAILABLE: what the kernel says.
absl::StatusOr<OpenedIo> MakeUringIo(UniqueFd& file, const IoOptions& options);
std::unique_ptr<IoBackend> MakeThreadPoolIo(UniqueFd file, const IoOptions& options);

}  // namespace larder
