// Writing into blocks on a GPU: kernels/blocks.h with a stream in the place of a Cpu, and RoPE on
// the way.
//
// Thread safety: calls share nothing but what they are given; like a kernel launch they return
// before the work is done. cudaErrorInvalidValue: a shape that is not supported, nothing launched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/blocks.h"
#include "kernels/cuda/batch.h"
#include "kernels/kv_layout.h"

namespace larder::kernels::cuda {

// Numbers of a key or of a value at most: DeepSeek's 576 and some.
inline constexpr int32_t kAppendDimMax = 640;

// Rotation of new rows, rope.h's formula; its angles come from RopeAngles.
struct RowRotation {
  const float* cos_sin = nullptr;  // device [batch.rows][2][dim / 2]; null: rows stay as they are
  int32_t begin = 0;               // first rotated number of a head, a multiple of 4
  int32_t dim = 0;                 // rotated numbers, a multiple of 8
};

// Stores the keys and values of a batch at their tokens' places in one layer, keys rotated, and
// rotates the batch's queries in place. Every storage type of kv_layout.h; one-byte storage is
// quantised as kernels/quantise.h says, bit by bit. Sums and products are float32.
struct AppendParams {
  KvLayer layer;  // key_dim and value_dim are multiples of 4, at most kAppendDimMax. Offsets and
                  // strides, like block addresses, are multiples of four numbers: 16 bytes of
                  // float32, 8 of 16 bits, 4 of codes; scales' are of 4
  DeviceBatch batch;
  DType type = DType::kBf16;  // of k, v and q: not quantised
  const void* k = nullptr;    // device [rows][kv_heads][key_dim]; latent: [rows][latent | rope].
                              // Aligned to four numbers, as v, q and cos_sin are
  int64_t k_stride = 0;       // numbers from a row to the next, a multiple of 4
  const void* v = nullptr;    // device [rows][kv_heads][value_dim]; latent: null
  int64_t v_stride = 0;       // likewise
  RowRotation rotation;
  void* q = nullptr;     // device [rows][q_heads][key_dim], rotated in place; null: left alone
  int64_t q_stride = 0;  // likewise
  int32_t q_heads = 0;
};
cudaError_t Append(const AppendParams& params, cudaStream_t stream);

// Copies `count` whole blocks, any arenas. Sources and targets are aligned to 16 bytes, and no
// target overlaps a source. For blocks on one device only: between host and device copy engines
// are quicker and leave the SMs alone.
struct CopyBlocksParams {
  const BlockCopy* copies = nullptr;  // device [count]
  int32_t count = 0;
  int64_t block_bytes = 0;  // a multiple of 16
};
cudaError_t CopyBlocks(const CopyBlocksParams& params, cudaStream_t stream);

}  // namespace larder::kernels::cuda
