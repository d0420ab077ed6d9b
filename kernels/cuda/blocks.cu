#include "kernels/cuda/blocks.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/vectors.h"

namespace larder::kernels::cuda {
namespace {

constexpr int kAppendWarps = 4;
constexpr int kAppendHeads = 4;  // of a warp, where there are many rows
constexpr int kAppendRowsMany = 512;
constexpr int kUnit = 4;                          // numbers that a lane has at a time
constexpr int kUnitsOfWarp = kUnit * kWarpLanes;  // numbers that a warp has at a time
constexpr int kUnitsMax = kAppendDimMax / kUnitsOfWarp;

// What a launch needs to know, by value.
template <typename T>
struct AppendArgs {
  KvLayer layer;
  DeviceBatch batch;
  RowRotation rotation;
  const T* k;
  const T* v;
  T* q;
  int64_t k_stride;
  int64_t v_stride;
  int64_t q_stride;
  int32_t heads_stored;  // keys and values of a row
  int32_t heads;         // and its queries
};

// Number 4 (lane + 32 u) + i of a row is x[u], component i.
template <int kUnits>
using Units = float4[kUnits];

template <int kUnits, typename Do>
__device__ void ForUnits(int dim, Do&& f) {
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int i = kUnit * (static_cast<int>(threadIdx.x) % kWarpLanes + u * kWarpLanes);
    if (i < dim) f(u, i);
  }
}

// rope.h's formula. Partners are read again instead of shuffled: they are in level 1, and lie in
// whatever lane the head's dim puts them.
template <int kUnits, typename T>
__device__ void Rotate(Units<kUnits>& x, const T* from, int dim, const RowRotation& rotation,
                       int row) {
  const int half = rotation.dim / 2;
  const float* const cosines = rotation.cos_sin + int64_t{row} * rotation.dim;
  ForUnits<kUnits>(dim, [&](int u, int i) {
    const int at = i - rotation.begin;
    if (at < 0 || at >= rotation.dim) return;
    const bool low = at < half;
    const int pair = low ? at : at - half;
    const float4 partner = LoadFour(from + (low ? i + half : i - half));
    const float4 c = LoadFour(cosines + pair);
    float4 s = LoadFour(cosines + half + pair);
    if (low) s = make_float4(-s.x, -s.y, -s.z, -s.w);
    x[u] = make_float4(fmaf(partner.x, s.x, x[u].x * c.x), fmaf(partner.y, s.y, x[u].y * c.y),
                       fmaf(partner.z, s.z, x[u].z * c.z), fmaf(partner.w, s.w, x[u].w * c.w));
  });
}

// quantise.h's QuantiseRow, by a warp.
template <typename S, int kUnits>
__device__ void StoreCodes(const Units<kUnits>& x, std::byte* to, float* scale_to, int dim) {
  float largest = 0;
  float nan = 0;
  ForUnits<kUnits>(dim, [&](int u, int) {
    largest = fmaxf(largest, LargestOf(x[u]));
    nan += NanUnlessFinite(x[u]);
  });
#pragma unroll
  for (int bit = 1; bit < kWarpLanes; bit *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, bit));
    nan += __shfl_xor_sync(kAllLanes, nan, bit);
  }
  const float scale = ScaleFrom(S::kType, nan == 0 ? largest : nan);
  ForUnits<kUnits>(dim, [&](int u, int i) {
    const float4 codes =
        scale > 0 ? make_float4(x[u].x / scale, x[u].y / scale, x[u].z / scale, x[u].w / scale)
                  : make_float4(0, 0, 0, 0);
    *reinterpret_cast<uint32_t*>(to + i) = PackFourCodes(S{}, codes);
  });
  if (threadIdx.x % kWarpLanes == 0) *scale_to = scale;
}

// The chunk of a row: the last that begins at or before it.
__device__ inline int ChunkOf(const DeviceBatch& batch, int row) {
  int low = 0;
  int high = batch.chunk_count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.row_begins[middle] <= row ? low : high) = middle;
  }
  return low;
}

// One key, value or query of a row.
template <typename T>
struct AppendHead {
  bool query;
  bool value;
  int own;  // number among the row's queries, values or keys
  int dim;
  const T* from;

  __device__ AppendHead(const AppendArgs<T>& args, int64_t row, int head)
      : query(head >= args.heads_stored),
        value(!query && head >= args.layer.kv_heads),
        own(head - (query   ? args.heads_stored
                    : value ? args.layer.kv_heads
                            : 0)),
        dim(value ? args.layer.value_dim : args.layer.key_dim),
        from((query   ? args.q + row * args.q_stride
              : value ? args.v + row * args.v_stride
                      : args.k + row * args.k_stride) +
             own * dim) {}
};

// Stores x as key or value `head` of a token, at `slot` of `block`.
template <typename T, typename S, int kUnits>
__device__ void StoreHead(const KvLayer& layer, const AppendHead<T>& head, const Units<kUnits>& x,
                          std::byte* block, int slot) {
  std::byte* const to = block + (head.value ? layer.value_offset_bytes : layer.key_offset_bytes) +
                        head.own * layer.head_stride_bytes + slot * layer.token_stride_bytes;
  if constexpr (kIsQuantised<S>) {
    std::byte* const scale =
        block + (head.value ? layer.value_scale_offset_bytes : layer.key_scale_offset_bytes) +
        head.own * layer.head_scale_stride_bytes + slot * kScaleBytes;
    StoreCodes<S, kUnits>(x, to, reinterpret_cast<float*>(scale), head.dim);
  } else {
    ForUnits<kUnits>(head.dim,
                     [&](int u, int i) { StoreFour(reinterpret_cast<S*>(to) + i, x[u]); });
  }
}

// A warp has up to kHeads keys, values and queries of a row, all loaded before the first is worked
// on, and finds the row's block once for them. Blocks: (row, part of its heads).
template <typename T, typename S, int kUnits, int kHeads>
__global__ void __launch_bounds__(kAppendWarps* kWarpLanes) AppendKernel(AppendArgs<T> args) {
  const int row = static_cast<int>(blockIdx.x);
  const int first = static_cast<int>(blockIdx.y * kAppendWarps * kHeads + threadIdx.x / kWarpLanes);
  if (first >= args.heads) return;
  FourBits<T> bits[kHeads][kUnits];
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    if (first + n * kAppendWarps >= args.heads) break;
    const AppendHead<T> head(args, row, first + n * kAppendWarps);
    ForUnits<kUnits>(head.dim, [&](int u, int i) { bits[n][u] = LoadFourBits(head.from + i); });
  }
  const int chunk_index = ChunkOf(args.batch, row);
  const SequenceChunk& chunk = args.batch.chunks[chunk_index];
  const int position = chunk.position + row - args.batch.row_begins[chunk_index];
  const int slot = position % args.layer.block_tokens;
  std::byte* const block = chunk.blocks[position / args.layer.block_tokens];
#pragma unroll
  for (int n = 0; n < kHeads; ++n) {
    if (first + n * kAppendWarps >= args.heads) break;
    const AppendHead<T> head(args, row, first + n * kAppendWarps);
    Units<kUnits> x;
    ForUnits<kUnits>(head.dim, [&](int u, int) { x[u] = FourOf<T>(bits[n][u]); });
    if (!head.value && args.rotation.cos_sin != nullptr) {
      Rotate<kUnits>(x, head.from, head.dim, args.rotation, row);
    }
    if (!head.query) {
      StoreHead<T, S, kUnits>(args.layer, head, x, block, slot);
      continue;
    }
    __syncwarp();  // partners have been read
    T* const to = args.q + (head.from - args.q);
    ForUnits<kUnits>(head.dim, [&](int u, int i) { StoreFour(to + i, x[u]); });
  }
}

template <typename T, typename S>
cudaError_t LaunchAppend(const AppendParams& params, cudaStream_t stream) {
  const KvLayer& layer = params.layer;
  AppendArgs<T> args{.layer = layer,
                     .batch = params.batch,
                     .rotation = params.rotation,
                     .k = static_cast<const T*>(params.k),
                     .v = static_cast<const T*>(params.v),
                     .q = static_cast<T*>(params.q),
                     .k_stride = params.k_stride,
                     .v_stride = params.v_stride,
                     .q_stride = params.q_stride,
                     .heads_stored = layer.latent ? layer.kv_heads : 2 * layer.kv_heads,
                     .heads = 0};
  const bool queries = params.q != nullptr && params.rotation.cos_sin != nullptr;
  args.heads = args.heads_stored + (queries ? params.q_heads : 0);
  const bool wide = layer.key_dim > kUnitsOfWarp || layer.value_dim > kUnitsOfWarp;
  // Many rows fill the GPU with fewer warps, that have more to do while they wait.
  const int heads_of_warp = wide || params.batch.rows < kAppendRowsMany ? 1 : kAppendHeads;
  const LaunchShape shape{
      .blocks = dim3(static_cast<unsigned>(params.batch.rows),
                     static_cast<unsigned>(CeilDiv(args.heads, kAppendWarps * heads_of_warp))),
      .threads = kAppendWarps * kWarpLanes};
  if (wide) return Launch(AppendKernel<T, S, kUnitsMax, 1>, shape, stream, args);
  return heads_of_warp == 1 ? Launch(AppendKernel<T, S, 1, 1>, shape, stream, args)
                            : Launch(AppendKernel<T, S, 1, kAppendHeads>, shape, stream, args);
}

template <typename T>
cudaError_t AppendAs(const AppendParams& params, cudaStream_t stream) {
  switch (params.layer.dtype) {
    case DType::kF32:
      return LaunchAppend<T, float>(params, stream);
    case DType::kF16:
      return LaunchAppend<T, F16>(params, stream);
    case DType::kBf16:
      return LaunchAppend<T, Bf16>(params, stream);
    case DType::kF8E4M3:
      return LaunchAppend<T, E4m3>(params, stream);
    case DType::kI8:
      return LaunchAppend<T, Int8>(params, stream);
  }
  return cudaErrorInvalidValue;
}

bool IsSupported(const AppendParams& params) {
  const KvLayer& layer = params.layer;
  const RowRotation& rotation = params.rotation;
  if (layer.kv_heads <= 0 || layer.block_tokens <= 0) return false;
  for (const int64_t dim : {layer.key_dim, layer.value_dim}) {
    if (dim <= 0 || dim > kAppendDimMax || dim % kUnit != 0) return false;
  }
  for (const int64_t offset : {layer.key_offset_bytes, layer.value_offset_bytes,
                               layer.head_stride_bytes, layer.token_stride_bytes}) {
    if (offset % (kUnit * BytesOf(layer.dtype)) != 0) return false;
  }
  for (const int64_t offset : {layer.key_scale_offset_bytes, layer.value_scale_offset_bytes,
                               layer.head_scale_stride_bytes}) {
    if (offset % kScaleBytes != 0) return false;
  }
  for (const int64_t stride : {params.k_stride, params.v_stride, params.q_stride}) {
    if (stride % kUnit != 0) return false;
  }
  if (rotation.cos_sin == nullptr) return true;
  return rotation.begin % kUnit == 0 && rotation.dim % (2 * kUnit) == 0 && rotation.begin >= 0 &&
         rotation.dim > 0 && rotation.begin + rotation.dim <= layer.key_dim;
}

// ---- CopyBlocks.

constexpr int kCopyThreads = 256;
constexpr int kCopyUnits = 4;  // 16-byte loads in flight a thread
constexpr int64_t kCopyPartBytes = int64_t{kCopyThreads} * kCopyUnits * 16;

__global__ void __launch_bounds__(kCopyThreads)
    CopyBlocksKernel(const BlockCopy* copies, int parts, int64_t block_bytes) {
  const BlockCopy copy = copies[blockIdx.x / parts];
  const int64_t units = block_bytes / 16;
  const int64_t first = int64_t{blockIdx.x} % parts * (kCopyPartBytes / 16) + threadIdx.x;
  const auto* const from = reinterpret_cast<const uint4*>(copy.from);
  auto* const to = reinterpret_cast<uint4*>(copy.to);
  uint4 x[kCopyUnits];
#pragma unroll
  for (int u = 0; u < kCopyUnits; ++u) {
    const int64_t at = first + u * kCopyThreads;
    if (at < units) x[u] = from[at];
  }
#pragma unroll
  for (int u = 0; u < kCopyUnits; ++u) {
    const int64_t at = first + u * kCopyThreads;
    if (at < units) to[at] = x[u];
  }
}

}  // namespace

cudaError_t Append(const AppendParams& params, cudaStream_t stream) {
  if (!IsSupported(params)) return cudaErrorInvalidValue;
  switch (params.type) {
    case DType::kF32:
      return AppendAs<float>(params, stream);
    case DType::kF16:
      return AppendAs<F16>(params, stream);
    case DType::kBf16:
      return AppendAs<Bf16>(params, stream);
    case DType::kF8E4M3:
    case DType::kI8:
      return cudaErrorInvalidValue;
  }
  return cudaErrorInvalidValue;
}

cudaError_t CopyBlocks(const CopyBlocksParams& params, cudaStream_t stream) {
  if (params.block_bytes % 16 != 0) return cudaErrorInvalidValue;
  const int64_t parts = (params.block_bytes + kCopyPartBytes - 1) / kCopyPartBytes;
  const LaunchShape shape{.blocks = dim3(static_cast<unsigned>(parts * params.count)),
                          .threads = kCopyThreads};
  return Launch(CopyBlocksKernel, shape, stream, params.copies, static_cast<int>(parts),
                params.block_bytes);
}

}  // namespace larder::kernels::cuda
