#include "client/worker/block_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace larder::worker {
namespace {

class HostMemory final : public BlockMemory {
 public:
  std::optional<DeviceUuid> device() const override { return std::nullopt; }

  absl::StatusOr<std::shared_ptr<std::byte>> Allocate(uint64_t bytes) override {
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      return absl::ResourceExhaustedError(
          absl::StrCat("mapping ", bytes, " bytes: ", strerror(errno)));
    }
    return std::shared_ptr<std::byte>(static_cast<std::byte*>(memory),
                                      [bytes](std::byte* mapped) { munmap(mapped, bytes); });
  }

  void Copy(std::byte* to, const std::byte* from, uint64_t bytes) override {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace

BlockMemory& HostBlockMemory() {
  static HostMemory memory;
  return memory;
}

}  // namespace larder::worker
