#include "storage/cuda_device.h"

#include <algorithm>

namespace larder {
namespace {

// Of CU_MEMHOSTREGISTER_*: pinned for every context, in case a process has several.
constexpr unsigned kPortable = 0x01;
// Of CU_IPC_MEM_*: the only flag there is, and required.
constexpr unsigned kLazyPeerAccess = 0x1;

std::atomic<bool> any_abandoned = false;

bool IsOrdinal(const std::string& text) {
  return !text.empty() && text.size() <= 4 &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// What is left of "GPU-6C8F2B1E-..." or "MIG-6c8f2b1e-..." when names of the same device are equal.
std::string Digits(const std::string& text) {
  std::string digits = text.substr(text.starts_with("GPU-") || text.starts_with("MIG-") ? 4 : 0);
  std::transform(digits.begin(), digits.end(), digits.begin(), [](char c) {
    return c >= 'A' && c <= 'F' ? static_cast<char>(c - 'A' + 'a') : c;
  });
  return digits;
}

}  // namespace

std::string FormatCudaUuid(const CudaUuid& uuid) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kHex[uuid.bytes[i] >> 4];
    text += kHex[uuid.bytes[i] & 15];
  }
  return text;
}

CudaOr<std::shared_ptr<CudaDevice>> CudaDevice::Open(const std::string& which,
                                                     const char* library) {
  const CudaOr<CudaDriver> loaded = CudaDriver::Load(library);
  if (!loaded.ok()) return loaded.status;
  const CudaDriver& driver = loaded.value;
  int count = 0;
  if (CudaStatus s = driver.Status(driver.DeviceGetCount(&count), "cuDeviceGetCount"); !s.ok()) {
    return s;
  }
  if (count == 0) return CudaStatus{kCudaNoDevice, "the NVIDIA driver has no device"};
  std::string known;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    int device = 0;
    CudaUuid uuid;
    char model[128] = "";
    for (const auto& [code, call] :
         {std::pair{driver.DeviceGet(&device, ordinal), "cuDeviceGet"},
          {driver.DeviceGetUuid(&uuid, device), "cuDeviceGetUuid"},
          {driver.DeviceGetName(model, sizeof(model), device), "cuDeviceGetName"}}) {
      if (CudaStatus s = driver.Status(code, call); !s.ok()) return s;
    }
    const std::string text = FormatCudaUuid(uuid);
    known += (known.empty() ? "" : ", ") + std::to_string(ordinal) + " is " + text;
    const bool wanted = which.empty() || Digits(which) == Digits(text) ||
                        (IsOrdinal(which) && std::stoi(which) == ordinal);
    if (!wanted) continue;
    std::shared_ptr<CudaDevice> opened(new CudaDevice(driver, device));
    opened->uuid_ = uuid;
    opened->name_ = std::string(model) + " (" + text + ")";
    CudaContext* context = nullptr;
    CudaStatus s =
        driver.Status(driver.DevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    if (!s.ok()) return s;
    opened->context_ = context;
    return opened;
  }
  return CudaStatus{kCudaInvalidDevice, "there is no device " + which + "; " + known};
}

void CudaDevice::Abandon() {
  abandoned_ = true;
  any_abandoned = true;
}

bool CudaDevice::AnyAbandoned() { return any_abandoned; }

CudaDevice::~CudaDevice() {
  if (context_ != nullptr && !abandoned_) driver_.DevicePrimaryCtxRelease(device_);
}

CudaDevice::Current::Current(const CudaDevice& device)
    : driver_(device.driver_),
      status_(driver_.Status(driver_.CtxPushCurrent(device.context_), "cuCtxPushCurrent")) {}

CudaDevice::Current::~Current() {
  CudaContext* popped = nullptr;
  if (status_.ok()) driver_.CtxPopCurrent(&popped);
}

CudaOr<CudaDevice::Memory> CudaDevice::MemoryInfo() const {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  size_t free = 0;
  size_t total = 0;
  CudaStatus s = driver_.Status(driver_.MemGetInfo(&free, &total), "cuMemGetInfo");
  if (!s.ok()) return s;
  return Memory{free, total};
}

CudaOr<CudaPointer> CudaDevice::Allocate(uint64_t bytes) const {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  CudaPointer pointer = 0;
  CudaStatus s = driver_.Status(driver_.MemAlloc(&pointer, bytes), "cuMemAlloc");
  if (!s.ok()) return s;
  return pointer;
}

void CudaDevice::Free(CudaPointer pointer) const {
  if (abandoned_) return;
  const Current current(*this);
  if (current.status().ok()) driver_.MemFree(pointer);
}

CudaOr<CudaIpcHandle> CudaDevice::Export(CudaPointer pointer) const {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  CudaIpcHandle handle;
  CudaStatus s = driver_.Status(driver_.IpcGetMemHandle(&handle, pointer), "cuIpcGetMemHandle");
  if (!s.ok()) return s;
  return handle;
}

CudaOr<CudaPointer> CudaDevice::Import(const CudaIpcHandle& handle) const {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  CudaPointer pointer = 0;
  CudaStatus s = driver_.Status(driver_.IpcOpenMemHandle(&pointer, handle, kLazyPeerAccess),
                                "cuIpcOpenMemHandle");
  if (!s.ok()) return s;
  return pointer;
}

void CudaDevice::Close(CudaPointer imported) const {
  if (abandoned_) return;
  const Current current(*this);
  if (current.status().ok()) driver_.IpcCloseMemHandle(imported);
}

CudaStatus CudaDevice::Register(void* memory, uint64_t bytes) const {
  const Current current(*this);
  if (!current.status().ok()) return current.status();
  return driver_.Status(driver_.MemHostRegister(memory, bytes, kPortable), "cuMemHostRegister");
}

void CudaDevice::Unregister(void* memory) const {
  if (abandoned_) return;
  const Current current(*this);
  if (current.status().ok()) driver_.MemHostUnregister(memory);
}

}  // namespace larder
