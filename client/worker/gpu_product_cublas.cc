#include <cublas_v2.h>

#include <cstddef>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/gpu_product.h"

namespace larder::worker {
namespace {

// What cuBLAS's manual recommends for sm_90; for others it recommends 4 MiB.
constexpr size_t kWorkspaceBytes = size_t{32} << 20;

absl::Status FromCublas(cublasStatus_t status, absl::string_view what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string text = absl::StrCat("cuBLAS: ", what, ": ", cublasGetStatusString(status));
  return status == CUBLAS_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(text)
                                              : absl::InternalError(text);
}

cudaDataType_t DataType(kernels::DType type) {
  return type == kernels::DType::kF32   ? CUDA_R_32F
         : type == kernels::DType::kF16 ? CUDA_R_16F
                                        : CUDA_R_16BF;
}

class CublasProduct final : public GpuProduct {
 public:
  CublasProduct(Gpu& gpu, cublasHandle_t handle) : gpu_(gpu), handle_(handle) {}

  absl::Status Prepare() {
    absl::Status status = FromCublas(cublasSetStream(handle_, gpu_.stream()), "its stream");
    // Parts of one sum are added up in float32, too.
    status.Update(
        FromCublas(cublasSetMathMode(handle_, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION),
                   "its arithmetic"));
    if (!status.ok()) return status;
    // Of our own, and so the same for every product and in every graph; after the stream, which
    // sets it back.
    absl::StatusOr<GpuBuffer> workspace = GpuBuffer::Device(kWorkspaceBytes);
    if (!workspace.ok()) return workspace.status();
    workspace_ = *std::move(workspace);
    return FromCublas(cublasSetWorkspace(handle_, workspace_.As<void>(), kWorkspaceBytes),
                      "its workspace");
  }
  ~CublasProduct() override { cublasDestroy(handle_); }

  // cuBLAS counts columns first, so rows of ours are its columns: out^T = W x^T.
  void Multiply(const GpuProductParams& p) override {
    const float one = 1;
    const float beta = p.add ? 1 : 0;
    const cublasStatus_t status =
        cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, p.outputs, p.rows, p.inputs, &one, p.weight,
                     DataType(p.type), p.inputs, p.x, DataType(p.type),
                     static_cast<int>(p.x_stride), &beta, p.out, DataType(p.out_type),
                     static_cast<int>(p.out_stride), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    gpu_.Check(FromCublas(status, "a product"));
  }

  std::string library() const override {
    int version = 0;
    cublasGetVersion(handle_, &version);
    return absl::StrCat("cublas ", version);
  }

 private:
  Gpu& gpu_;
  const cublasHandle_t handle_;
  GpuBuffer workspace_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GpuProduct>> GpuProduct::Create(Gpu& gpu) {
  cublasHandle_t handle = nullptr;
  absl::Status status = FromCublas(cublasCreate(&handle), "starting");
  if (!status.ok()) return status;
  auto product = std::make_unique<CublasProduct>(gpu, handle);
  status = product->Prepare();
  if (!status.ok()) return status;
  return absl::StatusOr<std::unique_ptr<GpuProduct>>(std::move(product));
}

}  // namespace larder::worker
