#include "kernels/ops.h"

#include "kernels/variant.h"

namespace larder::kernels {

void RmsNorm(const Cpu& cpu, const RmsNormParams& params) {
  const Variant& variant = VariantOf(cpu.isa);
  cpu.pool.ParallelFor(params.rows, [&](int64_t row, int) { variant.rms_norm_row(params, row); });
}

void SiluMul(const Cpu& cpu, const SiluMulParams& params) {
  const Variant& variant = VariantOf(cpu.isa);
  cpu.pool.ParallelFor(params.rows, [&](int64_t row, int) { variant.silu_mul_row(params, row); });
}

}  // namespace larder::kernels
