#include "storage/cuda_driver.h"

#include <dlfcn.h>

namespace larder {
namespace {

template <typename Function>
void Find(void* library, const char* name, Function*& function, std::string& missing) {
  function = reinterpret_cast<Function*>(::dlsym(library, name));
  if (function == nullptr && missing.empty()) missing = name;
}

}  // namespace

CudaOr<CudaDriver> CudaDriver::Load(const char* name) {
  void* const library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = ::dlerror();
    return CudaStatus{kCudaNoDriver, std::string("no NVIDIA driver: ") + (why ? why : name)};
  }
  CudaDriver driver;
  std::string missing;
  const auto find = [&](const char* symbol, auto& function) {
    Find(library, symbol, function, missing);
  };
  find("cuInit", driver.Init);
  find("cuGetErrorString", driver.GetErrorString);
  find("cuDeviceGetCount", driver.DeviceGetCount);
  find("cuDeviceGet", driver.DeviceGet);
  find("cuDeviceGetName", driver.DeviceGetName);
  find("cuDeviceGetUuid_v2", driver.DeviceGetUuid);  // of a MIG instance its own
  find("cuDevicePrimaryCtxRetain", driver.DevicePrimaryCtxRetain);
  find("cuDevicePrimaryCtxRelease_v2", driver.DevicePrimaryCtxRelease);
  find("cuCtxPushCurrent_v2", driver.CtxPushCurrent);
  find("cuCtxPopCurrent_v2", driver.CtxPopCurrent);
  find("cuMemGetInfo_v2", driver.MemGetInfo);
  find("cuMemAlloc_v2", driver.MemAlloc);
  find("cuMemFree_v2", driver.MemFree);
  find("cuIpcGetMemHandle", driver.IpcGetMemHandle);
  find("cuIpcOpenMemHandle_v2", driver.IpcOpenMemHandle);
  find("cuIpcCloseMemHandle", driver.IpcCloseMemHandle);
  find("cuMemHostRegister_v2", driver.MemHostRegister);
  find("cuMemHostUnregister", driver.MemHostUnregister);
  find("cuStreamCreate", driver.StreamCreate);
  find("cuStreamDestroy_v2", driver.StreamDestroy);
  find("cuMemcpyHtoDAsync_v2", driver.MemcpyHtoDAsync);
  find("cuMemcpyDtoHAsync_v2", driver.MemcpyDtoHAsync);
  find("cuEventCreate", driver.EventCreate);
  find("cuEventDestroy_v2", driver.EventDestroy);
  find("cuEventRecord", driver.EventRecord);
  find("cuEventQuery", driver.EventQuery);
  if (!missing.empty()) {
    return CudaStatus{kCudaNoDriver, std::string(name) + " has no " + missing +
                                         "; CUDA 11.4 (driver 470) or later is needed"};
  }
  if (CudaStatus status = driver.Status(driver.Init(0), "cuInit"); !status.ok()) return status;
  return driver;
}

CudaStatus CudaDriver::Status(int code, const char* call) const {
  if (code == 0) return {};
  const char* text = nullptr;
  if (GetErrorString(code, &text) != 0 || text == nullptr) text = "an unknown error";
  return {code, std::string(call) + ": " + text + " (CUDA " + std::to_string(code) + ")"};
}

}  // namespace larder
