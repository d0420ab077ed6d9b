// IoTransfer: one operation of an IoBackend, from its first call to the kernel to its last.
//
//   block  |  body: whole pages        | tail |
//   file   |  body                     | tail, zeros |     the tail by way of a page of ours
//
// A block that does not start on a page, where the file wants that (O_DIRECT), goes by way of
// our pages as a whole.
//
// Thread safety: none; whoever runs the operation has it.
//
// Invariants:
//   1. What is left is always whole pages at a multiple of 4096, so O_DIRECT takes it.
//   2. No byte outside of the block is read or written.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "storage/io_backend.h"

namespace larder {

struct IoJob {
  uint64_t offset = 0;          // in the file, a multiple of 4096
  std::byte* memory = nullptr;  // a write only reads it
  uint64_t bytes = 0;
  bool write = false;
  IoBackend::DoneFn done;
};

class IoTransfer {
 public:
  IoTransfer() = default;  // of nothing
  // `direct`: the file was opened with O_DIRECT.
  IoTransfer(IoJob job, bool direct);

  bool write() const { return job_.write; }
  uint64_t bytes() const { return job_.bytes; }

  // Where the next call has to go on, and with which parts, of which there are one or two.
  uint64_t offset() const { return job_.offset + moved_; }
  std::span<const iovec> Left();

  // Takes what a call returned: a count of bytes, 0 at the end of the file, or -errno. True:
  // there is nothing more to do. EINTR and EAGAIN are tried again, so many times in a row.
  bool Advance(int64_t result);

  // Tells the job's done how it went. `name` is the file's, for the message. Once, at the end.
  void Finish(const std::string& name);

 private:
  struct FreeDeleter {
    void operator()(std::byte* p) const { std::free(p); }
  };

  absl::Status Result(const std::string& name) const;

  IoJob job_;
  uint64_t file_bytes_ = 0;  // of the block, in whole pages
  uint64_t in_place_ = 0;                            // bytes of the block that go without our pages
  std::unique_ptr<std::byte[], FreeDeleter> pages_;  // the rest of them, padded
  uint64_t moved_ = 0;                               // of file_bytes_
  std::array<iovec, 2> left_{};
  int tries_ = 0;  // in a row that moved nothing
  int error_ = 0;
  bool ended_ = false;  // the file, before the block
};

}  // namespace larder
