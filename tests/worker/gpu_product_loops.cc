// GpuProduct for the emulated GPU: cuBLAS's twin, in loops.
#include <cstddef>

#include "client/worker/gpu_product.h"
#include "kernels/cuda/numbers.h"

namespace larder::worker {
namespace {

using kernels::DType;
using kernels::cuda::Bf16;
using kernels::cuda::F16;

class Loops final : public GpuProduct {
 public:
  void Multiply(const GpuProductParams& p) override {
    emulation::Enqueue([p] { p.type == DType::kF16 ? MultiplyAs<F16>(p) : MultiplyAs<Bf16>(p); });
  }
  std::string library() const override { return "loops"; }

 private:
  template <typename T>
  static void MultiplyAs(const GpuProductParams& p) {
    p.out_type == DType::kF32 ? MultiplyTo<T, float>(p) : MultiplyTo<T, T>(p);
  }

  template <typename T, typename Out>
  static void MultiplyTo(const GpuProductParams& p) {
    for (int32_t row = 0; row < p.rows; ++row) {
      const T* const x = static_cast<const T*>(p.x) + row * p.x_stride;
      for (int32_t output = 0; output < p.outputs; ++output) {
        const T* const weight = static_cast<const T*>(p.weight) + int64_t{output} * p.inputs;
        Out& out = static_cast<Out*>(p.out)[row * p.out_stride + output];
        float sum = p.add ? kernels::cuda::ToFloat(out) : 0;
        for (int32_t i = 0; i < p.inputs; ++i) {
          sum += kernels::cuda::ToFloat(x[i]) * kernels::cuda::ToFloat(weight[i]);
        }
        out = kernels::cuda::FromFloat<Out>(sum);
      }
    }
  }
};

}  // namespace

absl::StatusOr<std::unique_ptr<GpuProduct>> GpuProduct::Create(Gpu&) {
  return absl::StatusOr<std::unique_ptr<GpuProduct>>(std::make_unique<Loops>());
}

}  // namespace larder::worker
