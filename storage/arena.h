// Arena: contiguous shared memory, the bytes of one tier. The emulated GPU tier is a second one.
//
//   memfd:   | slot 1 .. | slot k .. |        ... |      slot n starts at byte (n - 1) * 4096
//            ^ base()                             ^ base() + bytes()
//
// The daemon creates it, workers map the same descriptor (storage/handover.h). Every page is
// there before Create returns, so nobody pays a first touch later (about 1 s a GiB).
//
// Thread safety: constant after construction; the bytes belong to whoever owns their slot.
//
// Invariants:
//   1. The file's size never changes: sealed against shrink, growth and further seals, so no
//      process that holds the descriptor can turn another's access into SIGBUS.
//   2. A mapping is never inherited by fork and its descriptor never by exec.
//   3. The memory of an arena is in no core dump.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "storage/check.h"
#include "storage/types.h"
#include "storage/unique_fd.h"

namespace larder {

class Arena {
 public:
  struct Options {
    std::string name;          // shown in /proc/*/maps
    uint64_t bytes = 0;        // a positive multiple of 4096
    bool huge_pages = true;    // try hugetlb (needs vm.nr_hugepages and a multiple of 2 MiB),
                               // then transparent huge pages, then ordinary ones
    int prefault_threads = 0;  // 0: one a CPU, at most 16
  };

  // New zeroed memory. INVALID_ARGUMENT for a size that is no multiple of 4096,
  // RESOURCE_EXHAUSTED when the machine (or this process's cgroup) has not that much: told
  // before a page is touched, so that nobody is killed for it.
  static absl::StatusOr<std::unique_ptr<Arena>> Create(const Options& options);

  // Maps the first `bytes` of another process's arena. Takes `fd` over, also on failure.
  // INVALID_ARGUMENT when the file is smaller than that or is not sealed against shrinking.
  static absl::StatusOr<std::unique_ptr<Arena>> Map(int fd, uint64_t bytes);

  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  int fd() const { return fd_.get(); }             // stays the arena's
  bool huge_pages() const { return huge_pages_; }  // hugetlb; transparent ones do not count

  // Where a slot starts. The slot must lie in the arena.
  std::byte* At(Slot slot) const {
    LARDER_CHECK(slot && slot.offset() < bytes_, "slot outside of its arena");
    return base_ + slot.offset();
  }

 private:
  Arena(UniqueFd fd, std::byte* base, uint64_t bytes, bool huge_pages)
      : fd_(std::move(fd)), base_(base), bytes_(bytes), huge_pages_(huge_pages) {}

  const UniqueFd fd_;
  std::byte* const base_;
  const uint64_t bytes_;
  const bool huge_pages_;
};

}  // namespace larder
