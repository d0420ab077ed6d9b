// A sequence's keys and values in blocks, for tests: one layer of several, in blocks that are
// allocations of their own. Whatever no token was written to is NaN in every storage type but int8,
// whose scales are.
//
// Thread safety: none.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu.h"
#include "kernels/kv_layout.h"
#include "tests/kernels/reference.h"

namespace larder::kernels::testing {

// Either kind of geometry, one layer of three.
struct TestLayer {
  KvLayer layer;
  int64_t block_bytes = 0;
};
TestLayer HeadsLayer(DType dtype, int32_t kv_heads, int32_t head_dim, int32_t block_tokens);
TestLayer LatentLayer(DType dtype, int32_t latent_dim, int32_t rope_dim, int32_t block_tokens);

class PagedKv {
 public:
  // `tokens` random keys and values; the same seed gives the same for any block size.
  PagedKv(const TestLayer& layer, int32_t tokens, uint32_t seed, double spread = 1);

  int32_t tokens() const { return static_cast<int32_t>(keys_.size()); }
  std::byte* const* table() const { return table_.data(); }
  // As they are stored, so exactly what a kernel reads.
  const HeadRows& keys() const { return keys_; }
  const HeadRows& values() const { return values_; }

  // Stores a key or value as the reference does, and returns what a kernel then reads. keys() and
  // values() stay what they were.
  std::vector<double> Write(int32_t token, int32_t head, bool value,
                            const std::vector<float>& numbers);
  // Takes away what tokens [begin, end) have, and the blocks that hold nothing else.
  void Forget(int32_t begin, int32_t end);
  std::byte* At(int32_t token, int32_t head, bool value) const;
  // Of quantised storage: where the scale of a key or value lies.
  std::byte* ScaleAt(int32_t token, int32_t head, bool value) const;

 private:
  const TestLayer layer_;
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
  std::vector<std::byte*> table_;
  HeadRows keys_;
  HeadRows values_;
};

std::vector<float> RandomFloats(std::mt19937& random, int64_t count, double spread = 1);

// A batch of chunks and their random queries, and what Attend makes of them.
struct AttentionCase {
  AttentionParams params;  // q, out, lse and chunks are set by Run
  std::vector<SequenceChunk> chunks;
  std::vector<float> q;  // [rows][q_heads][key_dim]
};

struct AttentionResult {
  std::vector<float> out;  // [rows][q_heads][value_dim]
  std::vector<float> lse;  // [rows][q_heads]
};

int64_t RowsOf(const AttentionCase& c);
AttentionResult RunAttention(const AttentionCase& c, Isa isa, int threads);

// For TEST_P over kIsas: a variant that this machine lacks is skipped by name.
class IsaTest : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    if (!IsSupported(GetParam())) {
      GTEST_SKIP() << "variant " << IsaName(GetParam()) << " does not run on this machine";
    }
  }
};

inline std::string NameOf(const ::testing::TestParamInfo<Isa>& info) { return IsaName(info.param); }

}  // namespace larder::kernels::testing
