// Rows from one array to another on a GPU: looked up, repeated, rounded to another type.
//
//   embedding      from [vocab][hidden], indices = tokens
//   rows wanted    from [rows][hidden], indices = which
//   a bias         from [1][dim], from_stride = 0: the same row for all
//   rounding       from float32 to what a product or the attention kernels take
//
// Thread safety: calls share nothing but what they are given; like a kernel launch they return
// before the work is done.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

// Rounded to nearest, ties to even. cudaErrorInvalidValue: a shape that is not supported, nothing
// launched.
struct CopyRowsParams {
  DType from_type = DType::kF32;     // not quantised, as to_type
  const void* from = nullptr;        // device; overlaps nothing of `to`
  int64_t from_stride = 0;           // numbers from a row to the next, a multiple of 4, or 0
  const int32_t* indices = nullptr;  // device [rows], which rows of `from`; null: one after another
  DType to_type = DType::kF32;
  void* to = nullptr;     // device [rows][dim], written
  int64_t to_stride = 0;  // numbers from a row to the next, a multiple of 4
  int32_t rows = 0;
  int32_t dim = 0;  // a multiple of 4
};
cudaError_t CopyRows(const CopyRowsParams& params, cudaStream_t stream);

}  // namespace larder::kernels::cuda
