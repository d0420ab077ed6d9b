#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "storage/arena.h"
#include "storage/errno_status.h"
#include "storage/memory_limit.h"
#include "storage/unique_fd.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace larder {
namespace {

constexpr uint64_t kHugePage = 2 << 20;
// Pre-faulted at a time by one thread: small enough to share the work evenly, large enough
// that a system call is nothing beside it.
constexpr uint64_t kPrefaultChunk = 64 << 20;
// Left to the rest of the machine when an arena takes what is available.
constexpr uint64_t kMemoryMargin = 128 << 20;

class ShmArena final : public Arena {
 public:
  ShmArena(UniqueFd fd, std::byte* base, uint64_t bytes, bool huge_pages)
      : Arena(base, bytes, /*addressable=*/true), fd_(std::move(fd)), huge_pages_(huge_pages) {}
  ~ShmArena() override { ::munmap(base(), bytes()); }

  int fd() const override { return fd_.get(); }
  bool huge_pages() const override { return huge_pages_; }
  wire::HandoverArena Description() const override {
    wire::HandoverArena description;
    description.kind = wire::kMemfd;
    description.bytes = bytes();
    return description;
  }

 private:
  const UniqueFd fd_;
  const bool huge_pages_;
};

struct Mapping {
  UniqueFd fd;
  std::byte* base = nullptr;
  bool huge_pages = false;
};

absl::Status NotEnough(const Arena::Options& options, absl::string_view why) {
  return absl::ResourceExhaustedError(
      absl::StrCat("arena ", options.name, ": bytes is ", options.bytes, ", but ", why));
}

// At an address where a huge page can begin. MAP_FAILED and errno as those of mmap.
void* MapShared(int fd, uint64_t bytes) {
  bytes = (bytes + kSlotGranule - 1) / kSlotGranule * kSlotGranule;
  // Addresses only; those on both sides are given back.
  void* const room = ::mmap(nullptr, bytes + kHugePage, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return room;
  const uint64_t before = -reinterpret_cast<uintptr_t>(room) % kHugePage;
  std::byte* const base = static_cast<std::byte*>(room) + before;
  if (before > 0) ::munmap(room, before);
  ::munmap(base + bytes, kHugePage - before);
  void* const mapped = ::mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    ::munmap(base, bytes);
    errno = error;
  }
  return mapped;
}

// One attempt: a file of the right size and kind, mapped, no page touched yet.
absl::StatusOr<Mapping> MapNewFile(const Arena::Options& options, bool hugetlb) {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (hugetlb ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
  UniqueFd fd(::memfd_create(options.name.c_str(), flags));
  if (!fd) return ErrnoStatus(absl::StrCat("arena ", options.name, ": memfd_create"), errno);
  if (::ftruncate(fd.get(), static_cast<off_t>(options.bytes)) != 0) {
    return NotEnough(options, absl::StrCat("ftruncate says: ", ErrnoText(errno)));
  }
  // With hugetlb this reserves the pages, so it fails here and not at the first touch.
  void* base = MapShared(fd.get(), options.bytes);
  if (base == MAP_FAILED) {
    return NotEnough(options, absl::StrCat("mmap says: ", ErrnoText(errno)));
  }
  return Mapping{std::move(fd), static_cast<std::byte*>(base), hugetlb};
}

absl::StatusOr<Mapping> MapNewFile(const Arena::Options& options) {
  if (options.huge_pages && options.bytes % kHugePage == 0) {
    auto huge = MapNewFile(options, /*hugetlb=*/true);
    if (huge.ok()) return huge;
  }
  const MemoryRoom room = MemoryAvailable();
  if (room.bytes < kMemoryMargin || options.bytes > room.bytes - kMemoryMargin) {
    return NotEnough(options,
                     absl::StrCat("only ", room.bytes, " are available, of which ", kMemoryMargin,
                                  " are left to others (", room.bound_by, ")"));
  }
  auto mapping = MapNewFile(options, /*hugetlb=*/false);
  if (mapping.ok()) {  // a hint; may be refused
    ::madvise(mapping->base, options.bytes, options.huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  }
  return mapping;
}

// Puts huge pages behind all of a range, even where shmem_enabled is "never". A block is then one
// piece of memory to a drive, not 512, most of which take 254 or fewer at a time. Where a page was in
// use (EAGAIN) it stays small. False: the kernel cannot, or has none left. Never a signal.
bool PopulateHuge(std::byte* base, uint64_t bytes) {
  // A huge page that has nothing in it is not made.
  for (uint64_t at = 0; at < bytes; at += kHugePage) {
    if (::madvise(base + at, kSlotGranule, MADV_POPULATE_WRITE) != 0) return false;
  }
  return ::madvise(base, bytes, MADV_COLLAPSE) == 0 ||
         (errno == EAGAIN && ::madvise(base, bytes, MADV_COLLAPSE) == 0) || errno == EAGAIN;
}

// Allocates the pages of one range. 0 or an errno; never a signal.
int Populate(const Mapping& mapping, uint64_t offset, uint64_t bytes) {
  if (::madvise(mapping.base + offset, bytes, MADV_POPULATE_WRITE) == 0) return 0;
  if (errno != EINVAL) return errno;
  // Before Linux 5.14. Allocates without mapping; the first touch is then a minor fault.
  if (::fallocate(mapping.fd.get(), 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)) ==
      0) {
    return 0;
  }
  return errno;
}

absl::Status Prefault(const Mapping& mapping, const Arena::Options& options) {
  const uint64_t chunks = (options.bytes + kPrefaultChunk - 1) / kPrefaultChunk;
  uint64_t threads = options.prefault_threads > 0
                         ? static_cast<uint64_t>(options.prefault_threads)
                         : std::clamp<uint64_t>(std::thread::hardware_concurrency(), 1, 16);
  threads = std::min(threads, chunks);
  std::atomic<uint64_t> next{0};
  std::atomic<int> error{0};
  // Until they have run out: the kernel looks long for one that it does not find.
  std::atomic<bool> huge{options.huge_pages && !mapping.huge_pages};
  const auto work = [&] {
    for (uint64_t i = next++; i < chunks && error == 0; i = next++) {
      const uint64_t offset = i * kPrefaultChunk;
      const uint64_t bytes = std::min(kPrefaultChunk, options.bytes - offset);
      if (huge && !PopulateHuge(mapping.base + offset, bytes / kHugePage * kHugePage)) huge = false;
      const int e = Populate(mapping, offset, bytes);
      if (e != 0) error = e;
    }
  };
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error == 0) return absl::OkStatus();
  return NotEnough(options, absl::StrCat("pre-faulting it says: ", ErrnoText(error)));
}

// Invariants 2 and 3 of the mapping. DONTFORK is a promise, the core dump a courtesy.
absl::Status Isolate(void* base, uint64_t bytes) {
  if (::madvise(base, bytes, MADV_DONTFORK) != 0) {
    return ErrnoStatus("arena: madvise(MADV_DONTFORK)", errno);
  }
  ::madvise(base, bytes, MADV_DONTDUMP);
  return absl::OkStatus();
}

bool IsHugetlb(int fd) {
  struct statfs info;
  return ::fstatfs(fd, &info) == 0 && static_cast<uint64_t>(info.f_type) == HUGETLBFS_MAGIC;
}

// What is wrong with a descriptor that came from another process; OK when nothing is.
absl::Status CheckForeignFile(int fd, uint64_t bytes) {
  struct stat info;
  if (::fstat(fd, &info) != 0) return ErrnoStatus("arena: fstat", errno);
  if (bytes == 0 || static_cast<uint64_t>(info.st_size) < bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("arena: bytes is ", bytes, ", must be 1 to the file's ", info.st_size));
  }
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::InvalidArgumentError("arena: the file is not sealed against shrinking");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Arena>> Arena::Create(const Options& options) {
  if (options.bytes == 0 || options.bytes % kSlotGranule != 0) {
    return absl::InvalidArgumentError(absl::StrCat("arena ", options.name, ": bytes is ",
                                                   options.bytes,
                                                   ", must be a positive multiple of 4096"));
  }
  auto mapping = MapNewFile(options);
  if (!mapping.ok()) return mapping.status();
  const bool huge_pages = mapping->huge_pages;
  std::byte* const base = mapping->base;
  absl::Status status = Isolate(base, options.bytes);
  if (status.ok()) status = Prefault(*mapping, options);
  if (status.ok() &&
      ::fcntl(mapping->fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    status = ErrnoStatus(absl::StrCat("arena ", options.name, ": sealing"), errno);
  }
  // From here on the arena unmaps.
  auto arena = std::make_unique<ShmArena>(std::move(mapping->fd), base, options.bytes, huge_pages);
  if (!status.ok()) return status;
  return arena;
}

absl::StatusOr<std::unique_ptr<Arena>> Arena::Map(int fd, uint64_t bytes) {
  UniqueFd owned(fd);
  if (absl::Status status = CheckForeignFile(fd, bytes); !status.ok()) return status;
  if (IsHugetlb(fd) && bytes % kHugePage != 0) {  // the kernel would map more
    return absl::InvalidArgumentError(absl::StrCat(
        "arena: bytes is ", bytes, ", must be a multiple of ", kHugePage, " of a hugetlb file"));
  }
  if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) return ErrnoStatus("arena: fcntl(FD_CLOEXEC)", errno);
  void* base = MapShared(fd, bytes);
  if (base == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("arena: mapping ", bytes, " bytes: ", ErrnoText(errno)));
  }
  auto arena = std::make_unique<ShmArena>(std::move(owned), static_cast<std::byte*>(base), bytes,
                                          IsHugetlb(fd));
  if (absl::Status status = Isolate(base, bytes); !status.ok()) return status;
  return arena;
}

}  // namespace larder
