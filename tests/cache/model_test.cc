#include "server/cache/model.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/string_view.h"

namespace larder {
namespace {

ModelSpec Llama3() {
  ModelSpec spec;
  spec.name = "meta-llama/Llama-3-8B";
  spec.weights_revision = "rev7";
  spec.lora = "sql@2";
  spec.salt = std::string("t\0x", 3);
  spec.layers = 32;
  spec.kv_heads = 8;
  spec.head_dim = 128;
  spec.dtype = DType::kBf16;
  spec.block_tokens = 16;
  spec.shards = 1;
  return spec;
}

std::string Hex(const BlockKey& key) {
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(key.bytes.data()), key.bytes.size()));
}

// Computed with python3's hashlib from the encoding in proto/larder/v1/types.proto:
//   s = lambda b: struct.pack('<I', len(b)) + b
//   sha256(b'larder.model.v1\0' + s(b'meta-llama/Llama-3-8B') + s(b'rev7') + s(b'sql@2')
//          + s(b't\0x') + struct.pack('<8I', 32, 8, 128, 0, 0, 3, 16, 1)).hexdigest()
TEST(Model, TheFingerprintIsTheDocumentedOne) {
  const auto model = MakeModel(Llama3());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(Hex(model->fingerprint),
            "c9a046306d921bb0f3911d494758343c57a7c5c49e4635584a1511d0aa0a0bbd");
  EXPECT_EQ(model->id, 0xb01b926d3046a0c9u);  // its first 8 bytes, read little-endian
}

TEST(Model, Llama3At16TokensIsExactlyTwoMiB) {
  EXPECT_EQ(MakeModel(Llama3())->block_bytes, 2u << 20);
}

TEST(Model, AnMlaBlockIsLayersTimesTokensTimesLatentAndRope) {
  ModelSpec spec = Llama3();
  spec.kv_heads = spec.head_dim = 0;
  spec.mla_latent_dim = 512;
  spec.mla_rope_dim = 64;
  spec.layers = 61;
  ASSERT_TRUE(MakeModel(spec).ok());
  EXPECT_EQ(MakeModel(spec)->block_bytes, 61u * 16 * (512 + 64) * 2);
}

TEST(Model, AnElementHasTheBytesOfItsType) {
  ModelSpec spec = Llama3();
  const std::pair<DType, uint32_t> types[] = {
      {DType::kF32, 4}, {DType::kF16, 2}, {DType::kBf16, 2}};
  for (const auto& [type, bytes] : types) {
    spec.dtype = type;
    EXPECT_EQ(MakeModel(spec)->block_bytes, bytes << 20);
  }
}

// As kernels/kv_layout.h has them.
TEST(Model, BlocksOfOneByteElementsEndInTheirScales) {
  for (const DType type : {DType::kF8E4M3, DType::kI8}) {
    ModelSpec spec = Llama3();
    spec.dtype = type;
    EXPECT_EQ(MakeModel(spec)->block_bytes, (1u << 20) + 32 * 2 * 8 * 16 * 4);
    spec.kv_heads = spec.head_dim = 0;
    spec.mla_latent_dim = 512;
    spec.mla_rope_dim = 64;
    EXPECT_EQ(MakeModel(spec)->block_bytes, 32u * 16 * (576 + 4));
  }
}

TEST(Model, EveryFieldIsPartOfTheIdentity) {
  const std::vector<std::function<void(ModelSpec&)>> changes = {
      [](ModelSpec&) {},
      [](ModelSpec& s) { s.name += "x"; },
      [](ModelSpec& s) { s.weights_revision += "x"; },
      [](ModelSpec& s) { s.lora += "x"; },
      [](ModelSpec& s) { s.salt += "x"; },
      [](ModelSpec& s) { s.salt = s.weights_revision, s.weights_revision.clear(); },
      [](ModelSpec& s) { s.layers += 1; },
      [](ModelSpec& s) { s.kv_heads += 1; },
      [](ModelSpec& s) { s.head_dim += 1; },
      [](ModelSpec& s) { std::swap(s.kv_heads, s.head_dim); },
      [](ModelSpec& s) { s.shards = 2; },
      [](ModelSpec& s) { s.shards = 8; },
      [](ModelSpec& s) { s.dtype = DType::kF16; },
      [](ModelSpec& s) { s.block_tokens += 1; },
      [](ModelSpec& s) { s.kv_heads = s.head_dim = 0, s.mla_latent_dim = 64; },
      [](ModelSpec& s) { s.kv_heads = s.head_dim = 0, s.mla_latent_dim = 64, s.mla_rope_dim = 8; },
  };
  std::set<ModelId> ids;
  std::set<BlockKey> fingerprints;
  for (const auto& change : changes) {
    ModelSpec spec = Llama3();
    change(spec);
    const auto model = MakeModel(spec);
    ASSERT_TRUE(model.ok()) << model.status();
    ids.insert(model->id);
    fingerprints.insert(model->fingerprint);
  }
  EXPECT_EQ(ids.size(), changes.size());
  EXPECT_EQ(fingerprints.size(), changes.size());
}

TEST(Model, ShardsDivideTheHeadsAndTheBlock) {
  for (const uint32_t shards : {1u, 2u, 4u, 8u}) {
    ModelSpec spec = Llama3();
    spec.shards = shards;
    const auto model = MakeModel(spec);
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ(model->block_bytes, (2u << 20) / shards);
    EXPECT_EQ(model->WholeBlockBytes(), 2u << 20);
    EXPECT_EQ(model->SlotBytes(Tier::kGpu), (2u << 20) / shards);
    EXPECT_EQ(model->SlotBytes(Tier::kHost), 2u << 20);
    EXPECT_EQ(model->SlotBytes(Tier::kNvme), 2u << 20);
  }
}

// Every rank of an MLA model needs the whole latent.
TEST(Model, ShardsOfAnMlaBlockAreAllTheWholeLatent) {
  ModelSpec spec = Llama3();
  spec.kv_heads = spec.head_dim = 0;
  spec.mla_latent_dim = 512;
  spec.mla_rope_dim = 64;
  spec.shards = 3;
  const auto model = MakeModel(spec);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->block_bytes, 32u * 16 * (512 + 64) * 2);
  EXPECT_EQ(model->WholeBlockBytes(), 3 * model->block_bytes);
}

TEST(Model, NoShardsIsReadAsOne) {
  ModelSpec spec = Llama3();
  spec.shards = 0;
  ASSERT_TRUE(MakeModel(spec).ok());
  EXPECT_EQ(MakeModel(spec)->id, MakeModel(Llama3())->id);
  EXPECT_EQ(MakeModel(spec)->spec.shards, 1u);
}

struct Bad {
  std::function<void(ModelSpec&)> change;
  std::string message;
};

TEST(Model, AWrongValueIsNamedWithItsBound) {
  const Bad cases[] = {
      {[](ModelSpec& s) { s.name = ""; }, "spec.name: 0 bytes given, allowed are 1 to 256"},
      {[](ModelSpec& s) { s.name.assign(257, 'x'); },
       "spec.name: 257 bytes given, allowed are 1 to 256"},
      {[](ModelSpec& s) { s.weights_revision.assign(257, 'x'); },
       "spec.weights_revision: 257 bytes given, allowed are 0 to 256"},
      {[](ModelSpec& s) { s.lora.assign(257, 'x'); },
       "spec.lora: 257 bytes given, allowed are 0 to 256"},
      {[](ModelSpec& s) { s.salt.assign(65, 'x'); },
       "spec.salt: 65 bytes given, allowed are 0 to 64"},
      {[](ModelSpec& s) { s.layers = 0; }, "spec.layers: 0 given, allowed are 1 to 1024"},
      {[](ModelSpec& s) { s.layers = 1025; }, "spec.layers: 1025 given, allowed are 1 to 1024"},
      {[](ModelSpec& s) { s.kv_heads = 0; }, "spec.kv_heads: 0 given, allowed are 1 to 1024"},
      {[](ModelSpec& s) { s.head_dim = 4097; }, "spec.head_dim: 4097 given, allowed are 1 to 4096"},
      {[](ModelSpec& s) { s.mla_latent_dim = 64; }, "spec.kv_heads: 8 given, allowed are 0 to 0"},
      {[](ModelSpec& s) { s.kv_heads = s.head_dim = 0, s.mla_rope_dim = 8; },
       "spec.mla_latent_dim: 0 given, allowed are 1 to 8192"},
      {[](ModelSpec& s) { s.kv_heads = s.head_dim = 0, s.mla_latent_dim = 8193; },
       "spec.mla_latent_dim: 8193 given, allowed are 1 to 8192"},
      {[](ModelSpec& s) { s.dtype = static_cast<DType>(0); },
       "spec.dtype: 0 given, allowed are 1 to 5"},
      {[](ModelSpec& s) { s.dtype = static_cast<DType>(6); },
       "spec.dtype: 6 given, allowed are 1 to 5"},
      {[](ModelSpec& s) { s.block_tokens = 0; },
       "spec.block_tokens: 0 given, allowed are 1 to 1024"},
      {[](ModelSpec& s) { s.block_tokens = 1025; },
       "spec.block_tokens: 1025 given, allowed are 1 to 1024"},
      {[](ModelSpec& s) { s.shards = 17; }, "spec.shards: 17 given, allowed are 1 to 16"},
      {[](ModelSpec& s) { s.shards = 3; },
       "spec.kv_heads: 8 given, must be a multiple of shards, 3"},
      {[](ModelSpec& s) { s.shards = 16; },
       "spec.kv_heads: 8 given, must be a multiple of shards, 16"},
      {[](ModelSpec& s) {  // two parts of 1 GiB each
         s.layers = 1024, s.kv_heads = s.head_dim = 0, s.mla_latent_dim = 8192;
         s.block_tokens = 64, s.shards = 2;
       },
       "spec: a block of 2147483648 bytes, at most 1073741824"},
      {[](ModelSpec& s) { s.layers = s.kv_heads = s.block_tokens = 1024, s.head_dim = 4096; },
       "spec: a block of 17592186044416 bytes, at most 1073741824"},
  };
  for (const Bad& bad : cases) {
    ModelSpec spec = Llama3();
    bad.change(spec);
    const auto model = MakeModel(spec);
    EXPECT_TRUE(absl::IsInvalidArgument(model.status())) << bad.message;
    EXPECT_EQ(model.status().message(), bad.message);
  }
}

TEST(Model, TheBoundsThemselvesAreAllowed) {
  ModelSpec spec = Llama3();
  spec.name.assign(256, 'x');
  spec.weights_revision.assign(256, 'x');
  spec.lora.assign(256, 'x');
  spec.salt.assign(64, 'x');
  spec.layers = 1024;
  spec.kv_heads = 1;
  spec.head_dim = 1;
  spec.block_tokens = 1024;
  EXPECT_TRUE(MakeModel(spec).ok());
  spec.kv_heads = 1024;
  spec.layers = 1;
  spec.block_tokens = 1;
  spec.head_dim = 4096;
  EXPECT_TRUE(MakeModel(spec).ok());
}

}  // namespace
}  // namespace larder
