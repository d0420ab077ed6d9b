// Arena: contiguous memory cut into slots, the bytes of one tier. Two kinds: shared memory of
// this machine (arena_shm.cc; HOST, and the emulated GPU tier), and memory of a CUDA device
// (arena_cuda.h). Slots and offsets mean the same in both.
//
//   memory:  | slot 1 .. | slot k .. |        ... |      slot n starts at byte (n - 1) * 4096
//            ^ base()                             ^ base() + bytes()
//
// The daemon creates it, workers map the same memory (storage/handover.h). Of shared memory every
// page is there before Create returns, so nobody pays a first touch later (about 1 s a GiB).
//
// Thread safety: constant after construction; the bytes belong to whoever owns their slot.
//
// Invariants:
//   1. Its size never changes. A file is sealed against shrink, growth and further seals, so no
//      process that holds the descriptor can turn another's access into SIGBUS.
//   2. A mapping is never inherited by fork and its descriptor never by exec.
//   3. The memory of an arena is in no core dump.
//   4. base() of a CUDA arena is an address of the device: nothing here may read or write there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "proto/larder/v1/handover.h"
#include "storage/check.h"
#include "storage/types.h"

namespace larder {

class Arena {
 public:
  struct Options {
    std::string name;          // shown in /proc/*/maps
    uint64_t bytes = 0;        // a positive multiple of 4096
    bool huge_pages = true;    // try hugetlb (needs vm.nr_hugepages and a multiple of 2 MiB),
                               // then transparent huge pages (Linux 6.1, or shmem_enabled), then
                               // ordinary ones
    int prefault_threads = 0;  // 0: one a CPU, at most 16
  };

  // New zeroed shared memory. INVALID_ARGUMENT for a size that is no multiple of 4096,
  // RESOURCE_EXHAUSTED when the machine (or this process's cgroup) has not that much: told
  // before a page is touched, so that nobody is killed for it.
  static absl::StatusOr<std::unique_ptr<Arena>> Create(const Options& options);

  // Maps the first `bytes` of another process's shared memory. Takes `fd` over, also on failure.
  // INVALID_ARGUMENT when the file is smaller than that or is not sealed against shrinking.
  static absl::StatusOr<std::unique_ptr<Arena>> Map(int fd, uint64_t bytes);

  virtual ~Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  std::byte* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }

  // Whether the CPU can read and write it. The bytes; empty where it cannot.
  bool addressable() const { return addressable_; }
  std::span<std::byte> host_bytes() const {
    return {base_, static_cast<size_t>(addressable_ ? bytes_ : 0)};
  }

  // Of shared memory; -1 and false otherwise.
  virtual int fd() const { return -1; }              // stays the arena's
  virtual bool huge_pages() const { return false; }  // hugetlb; transparent ones do not count

  // How another process gets at it: kind, size, and what a CUDA arena is opened by. The caller
  // sets `arena` and `tier`.
  virtual wire::HandoverArena Description() const = 0;

  // Where a slot starts. The slot must lie in the arena.
  std::byte* At(Slot slot) const {
    LARDER_CHECK(slot && slot.offset() < bytes_, "slot outside of its arena");
    return base_ + slot.offset();
  }

 protected:
  Arena(std::byte* base, uint64_t bytes, bool addressable)
      : base_(base), bytes_(bytes), addressable_(addressable) {}

 private:
  std::byte* const base_;
  const uint64_t bytes_;
  const bool addressable_;
};

}  // namespace larder
