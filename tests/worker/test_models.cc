#include "tests/worker/test_models.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "gtest/gtest.h"

namespace larder::worker {
namespace {

constexpr size_t kAlign = 64;
constexpr std::byte kFresh{0xff};  // a NaN in every dtype

}  // namespace

ModelConfig SmallConfig() {
  ModelConfig config;
  config.architecture = Architecture::kQwen2;
  config.layers = 3;
  config.hidden = 80;
  config.heads = 6;
  config.kv_heads = 2;
  config.head_dim = 16;
  config.ffn = 150;
  config.vocab = 261;
  config.max_positions = 4'096;
  config.tied_embeddings = true;
  config.qkv_bias = true;
  return config;
}

std::unique_ptr<Transformer> SmallTransformer(const TransformerOptions& options,
                                              const ModelConfig& config) {
  absl::StatusOr<Weights> weights = Weights::Random(config, 7);
  EXPECT_TRUE(weights.ok()) << weights.status();
  auto transformer = Transformer::Create(*std::move(weights), options);
  EXPECT_TRUE(transformer.ok()) << transformer.status();
  return *std::move(transformer);
}

std::vector<uint32_t> RandomTokens(std::mt19937& random, size_t count, uint32_t vocab) {
  std::vector<uint32_t> tokens(count);
  for (uint32_t& token : tokens) token = static_cast<uint32_t>(random() % vocab);
  return tokens;
}

TestBlocks::TestBlocks(const KvGeometry& geometry, size_t tokens, std::mt19937& random)
    : geometry_(geometry) {
  const size_t blocks = (tokens + geometry.block_tokens - 1) / geometry.block_tokens;
  const size_t stride = (geometry.BlockBytes() + kAlign - 1) / kAlign * kAlign;
  memory_.assign(blocks * stride + kAlign, kFresh);
  const auto base = reinterpret_cast<uintptr_t>(memory_.data());
  std::byte* const first = memory_.data() + (kAlign - base % kAlign) % kAlign;
  for (size_t i = 0; i < blocks; ++i) table_.push_back(first + i * stride);
  std::shuffle(table_.begin(), table_.end(), random);
}

TestBlocks::Row TestBlocks::RowOf(uint32_t layer, uint32_t part, uint32_t head,
                                  size_t token) const {
  const size_t element_bytes = geometry_.head_dim * DtypeBytes(geometry_.dtype);
  const size_t scale_bytes = geometry_.RowBytes() - element_bytes;
  const size_t rows = size_t{geometry_.layers} * 2 * geometry_.kv_heads * geometry_.block_tokens;
  const size_t index =
      ((size_t{layer} * 2 + part) * geometry_.kv_heads + head) * geometry_.block_tokens +
      token % geometry_.block_tokens;
  const std::byte* const block = table_[token / geometry_.block_tokens];
  return {{block + index * element_bytes, element_bytes},
          {block + rows * element_bytes + index * scale_bytes, scale_bytes}};
}

std::vector<std::byte> TestBlocks::Gather(size_t count) const {
  std::vector<std::byte> bytes;
  for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
    for (uint32_t part = 0; part < 2; ++part) {
      for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
        for (size_t token = 0; token < count; ++token) {
          const Row row = RowOf(layer, part, head, token);
          bytes.insert(bytes.end(), row.elements.begin(), row.elements.end());
          bytes.insert(bytes.end(), row.scale.begin(), row.scale.end());
        }
      }
    }
  }
  return bytes;
}

bool TestBlocks::Untouched(size_t begin, size_t end) const {
  for (size_t token = begin; token < end; ++token) {
    for (uint32_t layer = 0; layer < geometry_.layers; ++layer) {
      for (uint32_t part = 0; part < 2; ++part) {
        for (uint32_t head = 0; head < geometry_.kv_heads; ++head) {
          const Row row = RowOf(layer, part, head, token);
          const auto fresh = [](std::byte b) { return b == kFresh; };
          if (!std::all_of(row.elements.begin(), row.elements.end(), fresh) ||
              !std::all_of(row.scale.begin(), row.scale.end(), fresh)) {
            return false;
          }
        }
      }
    }
  }
  return true;
}

}  // namespace larder::worker
