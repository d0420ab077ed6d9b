#include "client/worker/gpu.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder::worker {

absl::Status FromCuda(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  static_cast<void>(cudaGetLastError());  // which would be taken for a later launch's
  const std::string text = absl::StrCat("CUDA: ", what, ": ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(text);
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      return absl::FailedPreconditionError(text);
    default:
      return absl::InternalError(text);
  }
}

absl::StatusOr<GpuBuffer> GpuBuffer::Device(size_t bytes) {
  void* memory = nullptr;
  const absl::Status status =
      FromCuda(cudaMalloc(&memory, bytes), absl::StrCat(bytes, " bytes of device memory"));
  if (!status.ok()) return status;
  return GpuBuffer(Memory(static_cast<std::byte*>(memory), [](std::byte* p) { cudaFree(p); }),
                   bytes);
}

absl::StatusOr<GpuBuffer> GpuBuffer::Pinned(size_t bytes) {
  void* memory = nullptr;
  const absl::Status status =
      FromCuda(cudaMallocHost(&memory, bytes), absl::StrCat(bytes, " bytes of pinned memory"));
  if (!status.ok()) return status;
  return GpuBuffer(Memory(static_cast<std::byte*>(memory), [](std::byte* p) { cudaFreeHost(p); }),
                   bytes);
}

absl::Status GpuBuffer::Grow(size_t bytes, absl::StatusOr<GpuBuffer> (*allocate)(size_t)) {
  if (bytes <= bytes_) return absl::OkStatus();
  absl::StatusOr<GpuBuffer> grown = allocate(std::bit_ceil(bytes));
  if (grown.ok()) *this = *std::move(grown);
  return grown.status();
}

absl::StatusOr<std::unique_ptr<Gpu>> Gpu::Open() {
  int device = 0;
  absl::Status status = FromCuda(cudaGetDevice(&device), "the device");
  if (!status.ok()) return status;
  cudaDeviceProp properties;
  status = FromCuda(cudaGetDeviceProperties(&properties, device), "the device");
  if (!status.ok()) return status;
  DeviceUuid uuid;
  std::copy_n(std::begin(properties.uuid.bytes), uuid.size(), uuid.begin());
  cudaStream_t stream = nullptr;
  status = FromCuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "a stream");
  if (!status.ok()) return status;
  return std::unique_ptr<Gpu>(new Gpu(stream, properties.multiProcessorCount,
                                      absl::StrCat("sm_", properties.major * 10 + properties.minor),
                                      uuid));
}

Gpu::~Gpu() { cudaStreamDestroy(stream_); }

// Other threads go on calling CUDA as they like: the capture forbids only its own thread to wait or
// to allocate.
absl::StatusOr<GpuGraph> Gpu::Capture(absl::FunctionRef<void()> launch) {
  absl::Status status = FromCuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
                                 "starting a capture");
  if (!status.ok()) return status;
  const absl::Status before = std::exchange(failed_, absl::OkStatus());
  launch();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
  // What was launched says more than what its end does.
  status = std::exchange(failed_, before);
  status.Update(FromCuda(ended, "ending a capture"));
  cudaGraphExec_t exec = nullptr;
  if (status.ok()) status = FromCuda(cudaGraphInstantiate(&exec, graph, 0), "a graph");
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (!status.ok()) return status;
  return GpuGraph(exec, cudaGraphExecDestroy);
}

absl::Status Gpu::Finish() {
  Check(cudaStreamSynchronize(stream_), "a step");
  return failed_;
}

absl::StatusOr<std::shared_ptr<std::byte>> Gpu::Allocate(uint64_t bytes) {
  absl::StatusOr<GpuBuffer> buffer = GpuBuffer::Device(bytes);
  if (!buffer.ok()) return buffer.status();
  const auto kept = std::make_shared<GpuBuffer>(*std::move(buffer));
  Check(cudaMemsetAsync(kept->As<std::byte>(), 0, bytes, stream_), "zeroing blocks");
  return std::shared_ptr<std::byte>(kept, kept->As<std::byte>());
}

// Whoever gives the source up after this may see it overwritten, so the copy is waited for.
void Gpu::Copy(std::byte* to, const std::byte* from, uint64_t bytes) {
  Check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "copying a block");
  Check(cudaStreamSynchronize(stream_), "copying a block");
}

}  // namespace larder::worker
