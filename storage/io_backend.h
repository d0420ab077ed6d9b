// IoBackend: positional reads and writes of one file, and its barrier.
//
// Thread safety: implementations are thread-safe.
//
// Invariants:
//   1. DoneFn is called exactly once an operation, from a thread of the backend's, never from
//      inside Read or Write.
//   2. Of the operations that wait, reads start before writes.
//   3. No byte outside of the given span is read or written, whatever its alignment.
//   4. The destructor completes every operation that was accepted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

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

// pread and pwrite in `threads` threads. `direct`: the file was opened with O_DIRECT.
// `name` goes into messages.
std::unique_ptr<IoBackend> MakeThreadPoolIo(UniqueFd file, bool direct, int threads,
                                            std::string name);

}  // namespace larder
