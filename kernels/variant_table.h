// The table of a vector type's kernels, for the end of each variant_*.cc. Internal to kernels/.
#pragma once

#include "kernels/piece_kernel.h"
#include "kernels/row_kernels.h"
#include "kernels/variant.h"

namespace larder::kernels {

template <typename V>
constexpr Variant TableOf() {
  return {.attend_pieces = &PieceKernel<V>::AttendPieces,
          .merge_pieces = &PieceKernel<V>::MergePieces,
          .attend_whole = &PieceKernel<V>::AttendWhole,
          .merge_row = &MergeRow<V>,
          .rms_norm_row = &RmsNormRow<V>,
          .silu_mul_row = &SiluMulRow<V>,
          .rope_row = &RopeRow<V>,
          .store_row = &StoreRow<V>};
}

extern const Variant kPortableVariant;
extern const Variant kAvx2Variant;
extern const Variant kAvx512Variant;

}  // namespace larder::kernels
