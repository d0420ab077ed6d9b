#include "tests/kernels/paged_kv.h"

#include <cstring>

namespace larder::kernels::testing {
namespace {

constexpr int32_t kLayers = 3;

}  // namespace

TestLayer HeadsLayer(DType dtype, int32_t kv_heads, int32_t head_dim, int32_t block_tokens) {
  const HeadGeometry geometry{dtype, kLayers, kv_heads, head_dim, block_tokens};
  return {LayerOf(geometry, 1), BlockBytes(geometry)};
}

TestLayer LatentLayer(DType dtype, int32_t latent_dim, int32_t rope_dim, int32_t block_tokens) {
  const LatentGeometry geometry{dtype, kLayers, latent_dim, rope_dim, block_tokens};
  return {LayerOf(geometry, 1), BlockBytes(geometry)};
}

std::vector<float> RandomFloats(std::mt19937& random, int64_t count, double spread) {
  std::normal_distribution<double> normal(0, spread);
  std::vector<float> numbers(count);
  for (float& x : numbers) x = static_cast<float>(normal(random));
  return numbers;
}

PagedKv::PagedKv(const TestLayer& test_layer, int32_t tokens, uint32_t seed, double spread)
    : layer_(test_layer) {
  const KvLayer& layer = layer_.layer;
  const int32_t blocks = (tokens + layer.block_tokens - 1) / layer.block_tokens;
  for (int32_t i = 0; i < blocks; ++i) {
    blocks_.push_back(std::make_unique<std::byte[]>(layer_.block_bytes));
    std::memset(blocks_.back().get(), 0xff, layer_.block_bytes);
    table_.push_back(blocks_.back().get());
  }
  std::mt19937 random(seed);
  const auto write = [&](int32_t token, int32_t head, bool value) {
    const int32_t dim = value ? layer.value_dim : layer.key_dim;
    return Write(token, head, value, RandomFloats(random, dim, value ? 1 : spread));
  };
  for (int32_t token = 0; token < tokens; ++token) {
    keys_.emplace_back();
    values_.emplace_back();
    for (int32_t head = 0; head < layer.kv_heads; ++head) {
      keys_.back().push_back(write(token, head, false));
      if (layer.latent) {
        const std::vector<double>& key = keys_.back().back();
        values_.back().emplace_back(key.begin(), key.begin() + layer.value_dim);
      } else {
        values_.back().push_back(write(token, head, true));
      }
    }
  }
}

std::vector<double> PagedKv::Write(int32_t token, int32_t head, bool value,
                                   const std::vector<float>& numbers) {
  const DType dtype = layer_.layer.dtype;
  const double scale = RowScale(dtype, numbers);
  std::vector<double> stored(numbers.size());
  std::byte* to = At(token, head, value);
  for (size_t i = 0; i < numbers.size(); ++i, to += BytesOf(dtype)) {
    Encode(dtype, RowCode(dtype, numbers[i], scale), to);
    stored[i] = Decoded(dtype, to) * scale;
  }
  if (IsQuantised(dtype)) {
    const auto stored_scale = static_cast<float>(scale);
    std::memcpy(ScaleAt(token, head, value), &stored_scale, sizeof(stored_scale));
  }
  return stored;
}

std::byte* PagedKv::At(int32_t token, int32_t head, bool value) const {
  const KvLayer& layer = layer_.layer;
  return table_[token / layer.block_tokens] +
         (value ? layer.value_offset_bytes : layer.key_offset_bytes) +
         head * layer.head_stride_bytes + token % layer.block_tokens * layer.token_stride_bytes;
}

std::byte* PagedKv::ScaleAt(int32_t token, int32_t head, bool value) const {
  const KvLayer& layer = layer_.layer;
  return table_[token / layer.block_tokens] +
         (value ? layer.value_scale_offset_bytes : layer.key_scale_offset_bytes) +
         head * layer.head_scale_stride_bytes + token % layer.block_tokens * kScaleBytes;
}

void PagedKv::Forget(int32_t begin, int32_t end) {
  const KvLayer& layer = layer_.layer;
  for (int32_t token = begin; token < end; ++token) {
    for (int32_t head = 0; head < layer.kv_heads; ++head) {
      std::memset(At(token, head, false), 0xff, layer.key_dim * BytesOf(layer.dtype));
      std::memset(At(token, head, true), 0xff, layer.value_dim * BytesOf(layer.dtype));
      if (!IsQuantised(layer.dtype)) continue;
      std::memset(ScaleAt(token, head, false), 0xff, kScaleBytes);
      std::memset(ScaleAt(token, head, true), 0xff, kScaleBytes);
    }
  }
  const int32_t first = (begin + layer.block_tokens - 1) / layer.block_tokens;
  for (int32_t block = first; (block + 1) * layer.block_tokens <= end; ++block) {
    blocks_[block].reset();
    table_[block] = nullptr;
  }
}

int64_t RowsOf(const AttentionCase& c) {
  int64_t rows = 0;
  for (const SequenceChunk& chunk : c.chunks) rows += chunk.tokens;
  return rows;
}

AttentionResult RunAttention(const AttentionCase& c, Isa isa, int threads) {
  ThreadPool pool(threads);
  const Cpu cpu{pool, isa};
  AttentionParams params = c.params;
  AttentionResult result;
  result.out.resize(RowsOf(c) * params.q_heads * params.layer.value_dim);
  result.lse.resize(RowsOf(c) * params.q_heads);
  params.q = c.q.data();
  params.q_stride = int64_t{params.q_heads} * params.layer.key_dim;
  params.out = result.out.data();
  params.out_stride = int64_t{params.q_heads} * params.layer.value_dim;
  params.lse = result.lse.data();
  params.chunks = c.chunks;
  // Scratch that holds nothing but NaN, so that what is not written shows.
  const size_t bytes = AttentionWorkspaceBytes(cpu, params);
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  const std::unique_ptr<std::byte, Free> workspace(
      static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
  std::memset(workspace.get(), 0xff, bytes);
  Attend(cpu, params, {workspace.get(), bytes});
  return result;
}

}  // namespace larder::kernels::testing
