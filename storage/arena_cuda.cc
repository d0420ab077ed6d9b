#include "storage/arena_cuda.h"

#include <cstring>
#include <map>
#include <utility>

#include "absl/base/const_init.h"
#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

namespace larder {
namespace {

CudaUuid UuidOf(const wire::HandoverArena& description) {
  CudaUuid uuid;
  std::memcpy(uuid.bytes, description.device_uuid, sizeof(uuid.bytes));
  return uuid;
}

CudaIpcHandle HandleOf(const wire::HandoverArena& description) {
  CudaIpcHandle handle;
  std::memcpy(handle.bytes, description.ipc_handle, sizeof(handle.bytes));
  return handle;
}

}  // namespace

absl::Status FromCuda(const CudaStatus& status) {
  switch (status.code) {
    case 0:
      return absl::OkStatus();
    case kCudaNoDriver:
    case kCudaNoDevice:
      return absl::FailedPreconditionError(status.text);
    case kCudaInvalidDevice:
      return absl::InvalidArgumentError(status.text);
    case kCudaOutOfMemory:
      return absl::ResourceExhaustedError(status.text);
    case kCudaStopped:
      return absl::CancelledError(status.text);
    default:
      return absl::UnavailableError(status.text);
  }
}

// One opened handle of this process, shared by the sessions that got it: a second cuIpcOpen would
// only count, and a client's sessions come and go.
class CudaArena::Imported {
 public:
  static absl::StatusOr<std::shared_ptr<Imported>> Open(const wire::HandoverArena& description,
                                                        uint64_t boot_id) {
    std::string key = absl::StrCat(boot_id, "/");
    key.append(reinterpret_cast<const char*>(description.device_uuid),
               sizeof(description.device_uuid));
    key.append(reinterpret_cast<const char*>(description.ipc_handle),
               sizeof(description.ipc_handle));
    absl::MutexLock lock(&mu_);
    std::weak_ptr<Imported>& known = (*known_)[key];
    if (std::shared_ptr<Imported> open = known.lock()) return open;
    CudaOr<std::shared_ptr<CudaDevice>> device =
        CudaDevice::Open(FormatCudaUuid(UuidOf(description)));
    if (device.status.code == kCudaInvalidDevice) {
      return absl::FailedPreconditionError(device.status.text);
    }
    if (!device.ok()) return FromCuda(device.status);
    const CudaOr<CudaPointer> pointer = device.value->Import(HandleOf(description));
    if (!pointer.ok()) return FromCuda(pointer.status);
    auto opened = std::make_shared<Imported>(std::move(device.value), pointer.value);
    known = opened;
    std::erase_if(*known_, [](const auto& each) { return each.second.expired(); });
    return opened;
  }

  Imported(std::shared_ptr<CudaDevice> device, CudaPointer pointer)
      : device_(std::move(device)), pointer_(pointer) {}
  ~Imported() { device_->Close(pointer_); }

  const std::shared_ptr<CudaDevice>& device() const { return device_; }
  CudaPointer pointer() const { return pointer_; }

 private:
  using Known = std::map<std::string, std::weak_ptr<Imported>>;
  static absl::Mutex mu_;
  static Known* const known_ ABSL_PT_GUARDED_BY(mu_);  // never destroyed: threads may outlive main

  const std::shared_ptr<CudaDevice> device_;
  const CudaPointer pointer_;
};

absl::Mutex CudaArena::Imported::mu_(absl::kConstInit);
CudaArena::Imported::Known* const CudaArena::Imported::known_ = new Known;

CudaArena::CudaArena(std::shared_ptr<CudaDevice> device, CudaPointer pointer,
                     const wire::HandoverArena& description, std::shared_ptr<Imported> imported)
    : Arena(reinterpret_cast<std::byte*>(pointer), description.bytes, /*addressable=*/false),
      device_(std::move(device)),
      description_(description),
      imported_(std::move(imported)) {}

CudaArena::~CudaArena() {
  if (imported_ == nullptr) device_->Free(pointer());
}

absl::StatusOr<std::unique_ptr<CudaArena>> CudaArena::Create(std::shared_ptr<CudaDevice> device,
                                                             uint64_t bytes,
                                                             uint64_t reserve_bytes) {
  if (bytes == 0 || bytes % kCudaArenaGranule != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("bytes is ", bytes, ", must be a positive multiple of ", kCudaArenaGranule));
  }
  const CudaOr<CudaDevice::Memory> memory = device->MemoryInfo();
  if (!memory.ok()) return FromCuda(memory.status);
  const auto [free, total] = memory.value;
  const auto fits = [&](uint64_t room) {
    return room >= reserve_bytes && bytes <= room - reserve_bytes;
  };
  const std::string what =
      absl::StrCat("bytes is ", bytes, ", but ", device->name(), " has ", total, ", of which ",
                   reserve_bytes, " are left to the workers (gpu-reserve)");
  if (!fits(total)) return absl::ResourceExhaustedError(what);
  const absl::Status held = absl::AbortedError(
      absl::StrCat("memory held by other processes: ", free, " are free; ", what));
  if (!fits(free)) return held;
  const CudaOr<CudaPointer> pointer = device->Allocate(bytes);
  if (pointer.status.code == kCudaOutOfMemory) return held;
  if (!pointer.ok()) return FromCuda(pointer.status);
  const CudaOr<CudaIpcHandle> handle = device->Export(pointer.value);
  if (!handle.ok()) {
    device->Free(pointer.value);
    return FromCuda(handle.status);
  }
  wire::HandoverArena description;
  description.kind = wire::kCudaIpc;
  description.bytes = bytes;
  std::memcpy(description.device_uuid, device->uuid().bytes, sizeof(description.device_uuid));
  std::memcpy(description.ipc_handle, handle.value.bytes, sizeof(description.ipc_handle));
  return std::unique_ptr<CudaArena>(
      new CudaArena(std::move(device), pointer.value, description, nullptr));
}

absl::StatusOr<std::unique_ptr<CudaArena>> CudaArena::Import(const wire::HandoverArena& description,
                                                             uint64_t boot_id) {
  absl::StatusOr<std::shared_ptr<Imported>> imported = Imported::Open(description, boot_id);
  if (!imported.ok()) return imported.status();
  const std::shared_ptr<Imported>& open = *imported;
  return std::unique_ptr<CudaArena>(
      new CudaArena(open->device(), open->pointer(), description, open));
}

CudaRegistration::CudaRegistration(std::shared_ptr<CudaDevice> device, const Arena& host)
    : device_(std::move(device)),
      memory_(host.base()),
      status_(FromCuda(device_->Register(host.base(), host.bytes()))) {}

CudaRegistration::~CudaRegistration() {
  if (status_.ok()) device_->Unregister(memory_);
}

}  // namespace larder
