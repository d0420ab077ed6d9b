// What a program that owns a GPU calls besides kernels: streams and graphs, pinned memory, the
// device's properties. Included by cuda_runtime.h.
//
// Thread safety: as cuda_runtime.h.
#pragma once

// A small GPU, so that plans of small shapes have several waves.
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
namespace larder::emulation {
// A test's to lower: GPUs of other generations have less.
inline int shared_bytes_max = 227 * 1024;
}  // namespace larder::emulation
inline cudaError_t cudaSetDevice(int device) {
  if (device == 0) return cudaSuccess;
  return larder::emulation::last_error = cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin
               ? larder::emulation::shared_bytes_max
               : 0;
  return cudaSuccess;
}

struct cudaUUID_t {
  char bytes[16];
};
struct cudaDeviceProp {
  cudaUUID_t uuid;
  int multiProcessorCount;
  int major, minor;
};
// The UUID is that of device 0 of tests/storage/fake_cuda: one machine to both.
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  for (int i = 0; i < 16; ++i) properties->uuid.bytes[i] = static_cast<char>(i * 16);
  return cudaDeviceGetAttribute(&properties->multiProcessorCount, cudaDevAttrMultiProcessorCount,
                                0);
}

inline constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaMallocHost(void** to, size_t bytes) { return cudaMalloc(to, bytes); }
inline cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }

// ---- Graphs, see stream.h.
using cudaGraph_t = larder::emulation::Graph*;
using cudaGraphExec_t = struct LarderEmulatedGraphExec { larder::emulation::Graph graph; }*;
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return larder::emulation::BeginCapture() ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = larder::emulation::EndCapture();
  return *graph != nullptr ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                        unsigned long long = 0) {
  *exec = new LarderEmulatedGraphExec{*graph};
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  larder::emulation::Launch(exec->graph);
  return cudaSuccess;
}
