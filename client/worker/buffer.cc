#include "client/worker/buffer.h"

#include <sys/mman.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace larder::worker {

absl::StatusOr<Buffer> Buffer::Allocate(size_t bytes) {
  if (bytes == 0) return Buffer();
  void* const memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("memory: ", bytes, " bytes; allowed: what the system has free"));
  }
  ::madvise(memory, bytes, MADV_HUGEPAGE);  // a hint; not every kernel has them
  return Buffer(std::span(static_cast<std::byte*>(memory), bytes));
}

Buffer::Buffer(Buffer&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

Buffer::~Buffer() {
  if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
}

}  // namespace larder::worker
