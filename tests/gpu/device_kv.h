// Random keys and values of a batch of sequences in blocks of one device arena, for tests. Blocks
// lie anywhere in the arena at multiples of 4 KiB. Every byte that holds no visible token is NaN,
// and the table has null for blocks without one. A sequence's numbers depend on the seed and its
// index only.
//
// Thread safety: none.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/kv_layout.h"
#include "tests/gpu/check.h"
#include "tests/kernels/reference.h"

namespace larder::gpu_tests {

using kernels::DType;
using kernels::KvLayer;
using kernels::SequenceChunk;
using kernels::testing::HeadRows;

inline constexpr int64_t kGranuleBytes = 4096;

struct TestLayer {
  KvLayer layer;
  int64_t block_bytes = 0;
};

// The second of two layers. `token_major`: a token's heads beside each other, as other engines have
// it.
inline TestLayer HeadsLayer(DType dtype, int32_t kv_heads, int32_t dim, int32_t block_tokens,
                            bool token_major = false) {
  const kernels::HeadGeometry geometry{dtype, 2, kv_heads, dim, block_tokens};
  TestLayer test{kernels::LayerOf(geometry, 1), kernels::BlockBytes(geometry)};
  if (token_major) {
    test.layer.head_stride_bytes = int64_t{dim} * kernels::BytesOf(dtype);
    test.layer.token_stride_bytes = test.layer.head_stride_bytes * kv_heads;
  }
  return test;
}

inline TestLayer LatentLayer(DType dtype, int32_t latent_dim, int32_t rope_dim,
                             int32_t block_tokens) {
  const kernels::LatentGeometry geometry{dtype, 2, latent_dim, rope_dim, block_tokens};
  return {kernels::LayerOf(geometry, 1), kernels::BlockBytes(geometry)};
}

struct TestSequence {
  int32_t position = 0;  // of its decode step: it has position + 1 keys
  HeadRows keys;         // as stored, so exactly what a kernel reads
  HeadRows values;
};

class DeviceKv {
 public:
  using IsVisible = std::function<bool(int32_t position, int32_t token)>;

  DeviceKv(const TestLayer& test, const std::vector<int32_t>& positions,
           const IsVisible& is_visible, uint32_t seed, double spread = 1)
      : layer_(test.layer) {
    std::mt19937 random(seed);
    const int64_t slot_bytes =
        (test.block_bytes + kGranuleBytes - 1) / kGranuleBytes * kGranuleBytes;
    std::vector<int64_t> table;
    std::vector<size_t> tables;
    int64_t blocks = 0;
    for (const int32_t position : positions) {
      tables.push_back(table.size());
      blocks += position / layer_.block_tokens + 1;
      table.resize(blocks);
    }
    // More slots than blocks, and one granule between some, so that nothing is at a round number.
    std::vector<int64_t> places(blocks + 3);
    int64_t end = 0;
    for (int64_t& place : places) {
      place = end + static_cast<int64_t>(random() % 2) * kGranuleBytes;
      end = place + slot_bytes;
    }
    std::shuffle(places.begin(), places.end(), random);
    std::vector<std::byte> host(end, std::byte{0xff});
    std::copy_n(places.begin(), blocks, table.begin());
    std::vector<bool> used(blocks);
    for (size_t s = 0; s < positions.size(); ++s) {
      sequences_.push_back({positions[s], {}, {}});
      std::mt19937 numbers(seed + static_cast<uint32_t>(s) + 1);
      for (int32_t t = 0; t <= positions[s]; ++t) {
        const size_t block = tables[s] + t / layer_.block_tokens;
        const bool visible = is_visible(positions[s], t);
        if (visible) used[block] = true;
        AddToken(&host[table[block]], t, visible, numbers, spread);
      }
    }
    arena_ = std::make_unique<DeviceArray<std::byte>>(host);
    std::vector<std::byte*> pointers(blocks);
    for (int64_t i = 0; i < blocks; ++i)
      pointers[i] = used[i] ? arena_->data() + table[i] : nullptr;
    table_ = std::make_unique<DeviceArray<std::byte*>>(pointers);
    std::vector<SequenceChunk> chunks;
    for (size_t s = 0; s < positions.size(); ++s) {
      chunks.push_back({table_->data() + tables[s], positions[s], 1});
    }
    chunks_ = std::make_unique<DeviceArray<SequenceChunk>>(chunks);
  }

  const std::vector<TestSequence>& sequences() const { return sequences_; }
  const SequenceChunk* chunks() const { return chunks_->data(); }

 private:
  // A token's key and value: in the block if visible, else only in the reference, where nobody
  // reads it.
  void AddToken(std::byte* block, int32_t token, bool visible, std::mt19937& random,
                double spread) {
    std::normal_distribution<double> normal(0, spread);
    TestSequence& sequence = sequences_.back();
    sequence.keys.emplace_back(layer_.kv_heads);
    sequence.values.emplace_back(layer_.kv_heads);
    for (int32_t head = 0; head < layer_.kv_heads; ++head) {
      std::byte* const at = block + head * layer_.head_stride_bytes +
                            token % layer_.block_tokens * layer_.token_stride_bytes;
      std::byte* const scale_at = block + head * layer_.head_scale_stride_bytes +
                                  token % layer_.block_tokens * kernels::kScaleBytes;
      const auto fill = [&](int64_t offset, int64_t scale_offset, int32_t dim,
                            std::vector<double>& row) {
        std::vector<float> numbers(dim);
        // Rows of codes differ in size by 2^8, so that a scale of another row shows.
        const double size =
            IsQuantised(layer_.dtype) ? std::ldexp(1, static_cast<int>(random() % 9) - 6) : 1;
        for (float& x : numbers) x = static_cast<float>(normal(random) * size);
        const double scale = kernels::testing::RowScale(layer_.dtype, numbers);
        row.resize(dim);
        for (int32_t i = 0; i < dim; ++i) {
          const double code = kernels::testing::RowCode(layer_.dtype, numbers[i], scale);
          row[i] = code * scale;
          if (!visible) continue;
          kernels::testing::Encode(layer_.dtype, code,
                                   at + offset + i * kernels::BytesOf(layer_.dtype));
        }
        if (!visible || !IsQuantised(layer_.dtype)) return;
        const auto stored = static_cast<float>(scale);
        std::memcpy(scale_at + scale_offset, &stored, sizeof(stored));
      };
      std::vector<double>& key = sequence.keys.back()[head];
      std::vector<double>& value = sequence.values.back()[head];
      fill(layer_.key_offset_bytes, layer_.key_scale_offset_bytes, layer_.key_dim, key);
      if (layer_.latent) {
        value.assign(key.begin(), key.begin() + layer_.value_dim);
      } else {
        fill(layer_.value_offset_bytes, layer_.value_scale_offset_bytes, layer_.value_dim, value);
      }
    }
  }

  KvLayer layer_;
  std::vector<TestSequence> sequences_;
  std::unique_ptr<DeviceArray<std::byte>> arena_;
  std::unique_ptr<DeviceArray<std::byte*>> table_;
  std::unique_ptr<DeviceArray<SequenceChunk>> chunks_;
};

}  // namespace larder::gpu_tests
