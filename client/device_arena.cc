#include "client/device_arena.h"

#include "absl/strings/str_cat.h"
#include "storage/arena_cuda.h"

namespace larder {
inline namespace client {

absl::StatusOr<DeviceArena> DeviceArenaIn(const HandoverArenas& handover, uint32_t arena) {
  if (arena < handover.why.size() && !handover.why[arena].ok()) return handover.why[arena];
  const auto* const opened = arena < handover.arenas.size()
                                 ? dynamic_cast<const CudaArena*>(handover.arenas[arena].get())
                                 : nullptr;
  if (opened == nullptr) {
    return absl::NotFoundError(absl::StrCat("arena ", arena, " is no device's memory"));
  }
  return DeviceArena{opened->pointer(), opened->bytes(), FormatCudaUuid(opened->device().uuid())};
}

}  // namespace client
}  // namespace larder
