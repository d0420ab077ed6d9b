// CudaDriver: the functions of NVIDIA's driver library that Larder calls, found at run time.
//
// The daemon launches no kernels, so the driver's own interface is enough: it is in libcuda.so.1
// wherever there is a driver, its names are versioned and its types have been stable since CUDA 4.
// So one binary, built without CUDA, has the GPU tier. The signatures are those of <cuda.h>; C++'s
// standard library is all that this file and cuda_device, cuda_copy_engine need, so that they also
// build where only a GPU and a compiler are (tests/gpu).
//
// Thread safety: constant after Load; the driver's functions are thread-safe.
//
// Invariants:
//   1. Every pointer of a loaded driver is set.
//   2. The library is never unloaded: it keeps threads of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace larder {

// What a call of the driver's said: 0 and no text, or its CUresult and
// "cuMemAlloc: out of memory (CUDA 2)".
struct [[nodiscard]] CudaStatus {
  int code = 0;
  std::string text = {};
  bool ok() const { return code == 0; }
};

template <typename T>
struct [[nodiscard]] CudaOr {
  CudaOr(CudaStatus s) : status(std::move(s)) {}  // NOLINT: converts, as StatusOr does
  CudaOr(T v) : value(std::move(v)) {}            // NOLINT
  bool ok() const { return status.ok(); }

  CudaStatus status;
  T value{};
};

// Results that are told apart. There are many more.
inline constexpr int kCudaInvalidValue = 1;
inline constexpr int kCudaOutOfMemory = 2;
inline constexpr int kCudaNoDevice = 100;
inline constexpr int kCudaInvalidDevice = 101;
inline constexpr int kCudaNotReady = 600;
inline constexpr int kCudaTimeout = 909;
// Ours: there is no driver library, or one that lacks a function; a batch did not start.
inline constexpr int kCudaNoDriver = -1;
inline constexpr int kCudaStopped = -2;

using CudaPointer = unsigned long long;  // NOLINT: CUdeviceptr; an address on the device
struct CudaContext;                      // CUctx_st and so on: never looked into
struct CudaStream;
struct CudaEvent;
struct CudaUuid {
  uint8_t bytes[16] = {};
  friend bool operator==(const CudaUuid&, const CudaUuid&) = default;
};
struct CudaIpcHandle {
  uint8_t bytes[64] = {};
};

struct CudaDriver {
  static constexpr const char* kLibrary = "libcuda.so.1";

  // Finds the library and its functions, and calls cuInit. kCudaNoDriver, or what cuInit said.
  static CudaOr<CudaDriver> Load(const char* library = kLibrary);

  // OK for 0, else the driver's own words after `call`.
  CudaStatus Status(int code, const char* call) const;

  int (*Init)(unsigned flags) = nullptr;
  int (*GetErrorString)(int error, const char** text) = nullptr;
  int (*DeviceGetCount)(int* count) = nullptr;
  int (*DeviceGet)(int* device, int ordinal) = nullptr;
  int (*DeviceGetName)(char* name, int length, int device) = nullptr;
  int (*DeviceGetUuid)(CudaUuid* uuid, int device) = nullptr;
  int (*DevicePrimaryCtxRetain)(CudaContext** context, int device) = nullptr;
  int (*DevicePrimaryCtxRelease)(int device) = nullptr;
  int (*CtxPushCurrent)(CudaContext* context) = nullptr;
  int (*CtxPopCurrent)(CudaContext** context) = nullptr;
  int (*MemGetInfo)(size_t* free, size_t* total) = nullptr;
  int (*MemAlloc)(CudaPointer* pointer, size_t bytes) = nullptr;
  int (*MemFree)(CudaPointer pointer) = nullptr;
  int (*IpcGetMemHandle)(CudaIpcHandle* handle, CudaPointer pointer) = nullptr;
  int (*IpcOpenMemHandle)(CudaPointer* pointer, CudaIpcHandle handle, unsigned flags) = nullptr;
  int (*IpcCloseMemHandle)(CudaPointer pointer) = nullptr;
  int (*MemHostRegister)(void* memory, size_t bytes, unsigned flags) = nullptr;
  int (*MemHostUnregister)(void* memory) = nullptr;
  int (*StreamCreate)(CudaStream** stream, unsigned flags) = nullptr;
  int (*StreamDestroy)(CudaStream* stream) = nullptr;
  int (*MemcpyHtoDAsync)(CudaPointer to, const void* from, size_t bytes,
                         CudaStream* stream) = nullptr;
  int (*MemcpyDtoHAsync)(void* to, CudaPointer from, size_t bytes, CudaStream* stream) = nullptr;
  int (*EventCreate)(CudaEvent** event, unsigned flags) = nullptr;
  int (*EventDestroy)(CudaEvent* event) = nullptr;
  int (*EventRecord)(CudaEvent* event, CudaStream* stream) = nullptr;
  int (*EventQuery)(CudaEvent* event) = nullptr;
};

}  // namespace larder
