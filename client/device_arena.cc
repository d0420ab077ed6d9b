#include "client/device_arena.h"

#include "absl/strings/str_cat.h"

namespace larder {
inline namespace client {

DeviceArenas::DeviceArenas(const std::vector<wire::HandoverArena>& arenas, uint64_t boot_id)
    : boot_id_(boot_id) {
  for (const wire::HandoverArena& arena : arenas) {
    if (arena.kind == wire::kCudaIpc) descriptions_[arena.arena] = arena;
  }
}

absl::StatusOr<DeviceArena> DeviceArenas::Open(uint32_t arena) {
  const auto described = descriptions_.find(arena);
  if (described == descriptions_.end()) {
    return absl::NotFoundError(absl::StrCat("arena ", arena, " is no device's memory"));
  }
  absl::MutexLock lock(&mu_);
  auto known = opened_.find(arena);
  if (known == opened_.end()) {
    known = opened_.emplace(arena, CudaArena::Import(described->second, boot_id_)).first;
  }
  const Opened& opened = known->second;
  if (!opened.ok()) return opened.status();
  return DeviceArena{(*opened)->pointer(), (*opened)->bytes(),
                     FormatCudaUuid((*opened)->device().uuid())};
}

}  // namespace client
}  // namespace larder
