// What the storage programs share: host memory that a device copies by itself, and batches that are
// waited for. C++'s standard library only.
//
// Thread safety: Pending is thread-safe, the rest is not.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "storage/cuda_copy_engine.h"

namespace larder::gpu {

// Ends the program with the driver's words when a call failed.
inline void Must(const CudaStatus& status, const char* what) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", what, status.text.c_str());
  std::exit(1);
}
template <typename T>
T Must(CudaOr<T> result, const char* what) {
  Must(result.status, what);
  return std::move(result.value);
}

// What HOST's pages may be: shared memory in small ones, or in huge ones where the system lets it
// or has set some aside. Anonymous ones, the driver's usual case, are there to compare with.
enum class Pages { kAnonymous, kSmall, kTransparentHuge, kHugetlb };
inline constexpr std::pair<Pages, const char*> kAllPages[] = {
    {Pages::kAnonymous, "anonymous"},
    {Pages::kSmall, "memfd"},
    {Pages::kTransparentHuge, "memfd, transparent huge pages"},
    {Pages::kHugetlb, "memfd, hugetlb"}};

// As storage/arena_shm.cc makes HOST: sealed, touched, not inherited by fork. Null, and errno: no
// such pages here.
inline std::byte* MapPages(Pages pages, uint64_t bytes) {
  const bool anonymous = pages == Pages::kAnonymous;
  int fd = -1;
  if (!anonymous) {
    const unsigned huge = pages == Pages::kHugetlb ? MFD_HUGETLB : 0;
    fd = ::memfd_create("storage-memory", MFD_CLOEXEC | MFD_ALLOW_SEALING | huge);
    if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return nullptr;
  }
  // Where a huge page can begin; the room before it is left alone.
  const uint64_t huge_page = 2 << 20;
  std::byte* place = nullptr;
  if (pages == Pages::kTransparentHuge) {
    void* const room = ::mmap(nullptr, bytes + huge_page, PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return nullptr;
    place = static_cast<std::byte*>(room) + -reinterpret_cast<uintptr_t>(room) % huge_page;
  }
  void* const memory = ::mmap(place, bytes, PROT_READ | PROT_WRITE,
                              (anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) |
                                  (place != nullptr ? MAP_FIXED : 0),
                              fd, 0);
  if (memory == MAP_FAILED) return nullptr;
  if (pages == Pages::kTransparentHuge) ::madvise(memory, bytes, MADV_HUGEPAGE);
  std::memset(memory, 0, bytes);
  if (pages == Pages::kTransparentHuge && ::madvise(memory, bytes, 25 /*MADV_COLLAPSE*/) != 0) {
    std::printf("no huge pages on demand: %s\n", std::strerror(errno));
  }
  if (fd >= 0) {
    ::madvise(memory, bytes, MADV_DONTFORK);
    ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    ::close(fd);
  }
  return static_cast<std::byte*>(memory);
}

// Host memory that is registered with the device as HOST is.
class PinnedMemory {
 public:
  PinnedMemory(std::shared_ptr<CudaDevice> device, uint64_t bytes, Pages pages = Pages::kSmall)
      : device_(std::move(device)), bytes_(bytes), data_(MapPages(pages, bytes)) {
    if (data_ == nullptr) Must({kCudaOutOfMemory, std::strerror(errno)}, "host memory");
    const auto start = std::chrono::steady_clock::now();
    Must(device_->Register(data_, bytes_), "register");
    registration_ = std::chrono::steady_clock::now() - start;
  }
  ~PinnedMemory() {
    device_->Unregister(data_);
    ::munmap(data_, bytes_);
  }
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;

  std::byte* data() const { return data_; }
  double registration_seconds() const { return registration_.count(); }

 private:
  const std::shared_ptr<CudaDevice> device_;
  const uint64_t bytes_;
  std::byte* const data_;
  std::chrono::duration<double> registration_{};
};

// Whether the machine has such pages; of hugetlb it seldom has.
inline bool HasPages(Pages pages, uint64_t bytes) {
  std::byte* const memory = MapPages(pages, bytes);
  if (memory != nullptr) ::munmap(memory, bytes);
  return memory != nullptr;
}

// Counts batches that are not done yet.
class Pending {
 public:
  CudaCopyEngine::DoneFn Add() {
    const std::lock_guard lock(mu_);
    ++left_;
    return [this](const CudaStatus& status) {
      Must(status, "copy");
      const std::lock_guard guard(mu_);
      if (--left_ == 0) none_.notify_all();
    };
  }
  void Wait() {
    std::unique_lock lock(mu_);
    none_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  std::mutex mu_;
  std::condition_variable none_;
  int left_ = 0;
};

}  // namespace larder::gpu
