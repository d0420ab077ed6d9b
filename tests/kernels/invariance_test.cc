// A row's result is the same bits however it is computed (kernels/attention.h, rule 1).
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/attention.h"
#include "tests/kernels/paged_kv.h"

namespace larder::kernels::testing {
namespace {

constexpr int32_t kTokens = 601;  // three pieces, the last unfinished
constexpr uint32_t kSeed = 11;

// One sequence whose every token has a query, computed in many ways.
struct Subject {
  DType dtype = DType::kBf16;
  int32_t kv_heads = 2;
  int32_t group = 3;
  int32_t dim = 64;
  int32_t rope_dim = 0;  // of MLA; 0: heads
  int32_t window = 0;
  int32_t sinks = 0;
  bool rotate = false;
};

class Sequence {
 public:
  explicit Sequence(const Subject& subject) : subject_(subject) {
    std::mt19937 random(kSeed);
    const KvLayer layer = Layer(16).layer;
    const int32_t heads = subject.kv_heads * subject.group;
    q_ = RandomFloats(random, int64_t{kTokens} * heads * layer.key_dim);
    cos_sin_ = RandomFloats(random, int64_t{kTokens} * layer.key_dim);
  }

  TestLayer Layer(int32_t block_tokens) const {
    const Subject& s = subject_;
    return s.rope_dim == 0 ? HeadsLayer(s.dtype, s.kv_heads, s.dim, block_tokens)
                           : LatentLayer(s.dtype, s.dim, s.rope_dim, block_tokens);
  }
  // The same numbers in blocks of any size.
  PagedKv InBlocks(int32_t block_tokens) const { return {Layer(block_tokens), kTokens, kSeed}; }

  // `kv` has blocks of block_tokens.
  AttentionCase Case(int32_t block_tokens) const {
    AttentionCase c;
    c.params.layer = Layer(block_tokens).layer;
    c.params.q_heads = subject_.kv_heads * subject_.group;
    c.params.scale = 0.125f;
    c.params.window = subject_.window;
    c.params.sinks = subject_.sinks;
    if (subject_.rotate) c.params.rotation = {cos_sin_.data(), 0, c.params.layer.key_dim};
    return c;
  }

  // Adds tokens [position, position + tokens) to the batch.
  void Add(AttentionCase& c, const PagedKv& kv, int32_t position, int32_t tokens) const {
    c.chunks.push_back({kv.table(), position, tokens});
    const int64_t row = int64_t{c.params.q_heads} * c.params.layer.key_dim;
    c.q.insert(c.q.end(), q_.begin() + position * row, q_.begin() + (position + tokens) * row);
  }

  // Rows [position, position + tokens) of `all` against the first rows of `some` after `skip`.
  ::testing::AssertionResult Same(const AttentionResult& all, int32_t position,
                                  const AttentionResult& some, int64_t skip, int32_t tokens) const {
    const AttentionCase c = Case(16);
    const int64_t heads = c.params.q_heads;
    const int64_t width = heads * c.params.layer.value_dim;
    for (int32_t i = 0; i < tokens; ++i) {
      const bool same = std::memcmp(&all.out[(position + i) * width], &some.out[(skip + i) * width],
                                    width * sizeof(float)) == 0 &&
                        std::memcmp(&all.lse[(position + i) * heads], &some.lse[(skip + i) * heads],
                                    heads * sizeof(float)) == 0;
      if (!same) return ::testing::AssertionFailure() << "token " << position + i << " differs";
    }
    return ::testing::AssertionSuccess();
  }

 private:
  const Subject subject_;
  std::vector<float> q_;
  std::vector<float> cos_sin_;  // any numbers will do
};

const Subject kSubjects[] = {
    {.dtype = DType::kBf16, .kv_heads = 2, .group = 4, .dim = 128},
    {.dtype = DType::kBf16, .kv_heads = 8, .group = 1, .dim = 96},
    {.dtype = DType::kBf16, .kv_heads = 4, .group = 2, .dim = 80, .window = 100, .sinks = 40},
    {.dtype = DType::kF16, .kv_heads = 1, .group = 7, .dim = 80},
    {.dtype = DType::kF16, .kv_heads = 2, .group = 4, .dim = 128},
    {.dtype = DType::kF32, .kv_heads = 3, .group = 1, .dim = 20},
    {.dtype = DType::kBf16, .kv_heads = 1, .group = 80, .dim = 48, .rope_dim = 16},
    {.dtype = DType::kBf16, .kv_heads = 2, .group = 2, .window = 270, .sinks = 5},
    {.dtype = DType::kF32, .kv_heads = 1, .group = 5, .window = 7, .sinks = 0},
    {.dtype = DType::kBf16, .kv_heads = 2, .group = 2, .window = 40, .sinks = 33, .rotate = true},
    {.dtype = DType::kF8E4M3, .kv_heads = 2, .group = 4, .dim = 128},
    {.dtype = DType::kI8, .kv_heads = 4, .group = 1, .dim = 80, .window = 270, .sinks = 5},
    {.dtype = DType::kI8, .kv_heads = 2, .group = 2, .window = 40, .sinks = 33, .rotate = true},
    {.dtype = DType::kF8E4M3, .kv_heads = 1, .group = 80, .dim = 48, .rope_dim = 16},
    {.dtype = DType::kF8E4M3, .kv_heads = 1, .group = 7, .dim = 96},
    {.dtype = DType::kF8E4M3, .kv_heads = 4, .group = 1, .dim = 80, .window = 100, .sinks = 40},
    {.dtype = DType::kF8E4M3, .kv_heads = 2, .group = 2, .window = 40, .sinks = 33, .rotate = true},
};

class InvarianceTest : public IsaTest {
 protected:
  // Every token by a prefill of the whole prompt on one thread: what the rest is compared with.
  AttentionResult Whole(const Sequence& sequence) {
    const PagedKv kv = sequence.InBlocks(16);
    AttentionCase c = sequence.Case(16);
    sequence.Add(c, kv, 0, kTokens);
    return RunAttention(c, GetParam(), 1);
  }
};
INSTANTIATE_TEST_SUITE_P(Isa, InvarianceTest, ::testing::ValuesIn(kIsas), NameOf);

TEST_P(InvarianceTest, DecodeIsPrefill) {
  for (const Subject& subject : kSubjects) {
    const Sequence sequence(subject);
    const AttentionResult whole = Whole(sequence);
    const PagedKv kv = sequence.InBlocks(16);
    for (const int32_t position : {0, 1, 30, 31, 32, 255, 256, 257, 300, 511, 512, 599, 600}) {
      for (const int threads : {1, 3}) {  // whole tiles, and split
        AttentionCase c = sequence.Case(16);
        sequence.Add(c, kv, position, 1);
        ASSERT_TRUE(sequence.Same(whole, position, RunAttention(c, GetParam(), threads), 0, 1))
            << "subject " << &subject - kSubjects << ", " << threads << " threads";
      }
    }
  }
}

TEST_P(InvarianceTest, ChunksDoNotMatter) {
  std::mt19937 random(kSeed);
  for (const Subject& subject : kSubjects) {
    const Sequence sequence(subject);
    const AttentionResult whole = Whole(sequence);
    const PagedKv kv = sequence.InBlocks(16);
    for (int32_t position = 0; position < kTokens;) {
      const auto tokens = std::min(static_cast<int32_t>(1 + random() % 130), kTokens - position);
      AttentionCase c = sequence.Case(16);
      sequence.Add(c, kv, position, tokens);
      ASSERT_TRUE(sequence.Same(whole, position, RunAttention(c, GetParam(), 2), 0, tokens))
          << "subject " << &subject - kSubjects << ", " << tokens << " tokens";
      position += tokens;
    }
  }
}

TEST_P(InvarianceTest, ThreadsAndBlockSizesDoNotMatter) {
  for (const Subject& subject : kSubjects) {
    const Sequence sequence(subject);
    const AttentionResult whole = Whole(sequence);
    for (const int32_t block_tokens : {1, 3, 32, 64}) {
      const PagedKv kv = sequence.InBlocks(block_tokens);
      for (const int threads : {1, 2, 7}) {
        AttentionCase c = sequence.Case(block_tokens);
        sequence.Add(c, kv, 590, 11);
        ASSERT_TRUE(sequence.Same(whole, 590, RunAttention(c, GetParam(), threads), 0, 11))
            << "subject " << &subject - kSubjects << ", blocks of " << block_tokens << ", "
            << threads << " threads";
      }
    }
  }
}

TEST_P(InvarianceTest, TheBatchDoesNotMatter) {
  for (const Subject& subject : kSubjects) {
    const Sequence sequence(subject);
    const AttentionResult whole = Whole(sequence);
    const PagedKv kv = sequence.InBlocks(16);
    for (const int threads : {1, 4}) {
      AttentionCase c = sequence.Case(16);
      const std::pair<int32_t, int32_t> chunks[] = {{300, 1}, {0, 70}, {600, 1}, {7, 0}, {250, 9}};
      for (const auto& [position, tokens] : chunks) sequence.Add(c, kv, position, tokens);
      const AttentionResult batch = RunAttention(c, GetParam(), threads);
      int64_t row = 0;
      for (const auto& [position, tokens] : chunks) {
        ASSERT_TRUE(sequence.Same(whole, position, batch, row, tokens))
            << "subject " << &subject - kSubjects << ", " << threads << " threads";
        row += tokens;
      }
    }
  }
}

}  // namespace
}  // namespace larder::kernels::testing
