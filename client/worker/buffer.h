// Buffer: memory for weights and activations, zeroed, from whole pages.
//
// Thread safety: as a pointer's.
#pragma once

#include <cstddef>
#include <span>

#include "absl/status/statusor.h"

namespace larder::worker {

class Buffer {
 public:
  Buffer() = default;
  // Huge pages where the system has them: weights are read once a step, from front to back.
  // RESOURCE_EXHAUSTED when there is not so much memory. Zero bytes are a buffer as well.
  static absl::StatusOr<Buffer> Allocate(size_t bytes);

  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  std::byte* data() const { return bytes_.data(); }  // aligned to a page
  std::span<std::byte> bytes() const { return bytes_; }
  template <typename T>
  T* As() const {
    return reinterpret_cast<T*>(bytes_.data());
  }

 private:
  explicit Buffer(std::span<std::byte> bytes) : bytes_(bytes) {}

  std::span<std::byte> bytes_;  // empty: nothing is owned
};

}  // namespace larder::worker
