// Attend and MergeAttention against the formula in double precision.
#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <ostream>
#include <utility>

#include "tests/kernels/paged_kv.h"

namespace larder::kernels::testing {
namespace {

// A batch over random sequences. Prints as a literal, with the seed.
struct Shape {
  uint32_t seed = 0;
  DType dtype = DType::kBf16;
  int32_t kv_heads = 1;
  int32_t group = 1;
  int32_t dim = 64;      // of a head; of a latent vector
  int32_t rope_dim = 0;  // of MLA; 0: heads
  int32_t block_tokens = 16;
  int32_t window = 0;
  int32_t sinks = 0;
  bool rotate = false;
  int threads = 1;
  std::vector<std::pair<int32_t, int32_t>> chunks = {};  // position, tokens
};

std::ostream& operator<<(std::ostream& out, const Shape& s) {
  out << "{" << s.seed << ", DType{" << static_cast<int>(s.dtype) << "}, " << s.kv_heads << ", "
      << s.group << ", " << s.dim << ", " << s.rope_dim << ", " << s.block_tokens << ", "
      << s.window << ", " << s.sinks << ", " << s.rotate << ", " << s.threads << ", {";
  for (const auto& [position, tokens] : s.chunks) out << "{" << position << ", " << tokens << "}, ";
  return out << "}}";
}

template <typename T, size_t N>
T Pick(std::mt19937& random, const T (&from)[N]) {
  return from[random() % N];
}

constexpr DType kDTypes[] = {DType::kF32, DType::kF16, DType::kBf16, DType::kF8E4M3, DType::kI8};

Shape RandomShape(uint32_t seed) {
  std::mt19937 random(seed);
  Shape s;
  s.seed = seed;
  s.dtype = Pick(random, kDTypes);
  s.kv_heads = Pick(random, {1, 1, 2, 3});
  s.group = Pick(random, {1, 2, 3, 4, 7, 8});
  s.dim = Pick(random, {32, 64, 80, 96, 128, 256, 20, 6});
  if (random() % 4 == 0) {
    s.rope_dim = Pick(random, {16, 64, 10});
    s.kv_heads = 1;
  }
  s.block_tokens = Pick(random, {1, 2, 3, 5, 8, 16, 32, 64});
  if (random() % 2 == 0) {
    s.window = static_cast<int32_t>(1 + random() % 300);
    s.sinks = static_cast<int32_t>(random() % 40);
  }
  s.rotate = random() % 3 == 0;
  s.threads = Pick(random, {1, 2, 5});
  const int chunks = static_cast<int>(1 + random() % 3);
  for (int i = 0; i < chunks; ++i) {
    const int32_t position = Pick(random, {0, 1, 31, 32, 255, 256, 257, 400});
    s.chunks.emplace_back(position + random() % 3, Pick(random, {0, 1, 1, 1, 2, 5, 17, 70}));
  }
  return s;
}

// Sequences, queries and rotation of a shape.
class Batch {
 public:
  explicit Batch(const Shape& s) : shape_(s) {
    std::mt19937 random(s.seed + 1000);
    const TestLayer layer = s.rope_dim == 0
                                ? HeadsLayer(s.dtype, s.kv_heads, s.dim, s.block_tokens)
                                : LatentLayer(s.dtype, s.dim, s.rope_dim, s.block_tokens);
    AttentionParams& params = attention.params;
    params.layer = layer.layer;
    params.q_heads = s.kv_heads * s.group;
    params.scale = 1 / std::sqrt(static_cast<float>(params.layer.key_dim));
    params.window = s.window;
    params.sinks = s.sinks;
    for (const auto& [position, tokens] : s.chunks) {
      sequences_.emplace_back(layer, position + tokens, static_cast<uint32_t>(random()));
      PagedKv& kv = sequences_.back();
      // Nobody may miss what lies between sinks and the first token's window.
      if (s.window > 0) kv.Forget(std::min(s.sinks, position), position - s.window + 1);
      attention.chunks.push_back({kv.table(), position, tokens});
    }
    attention.q = RandomFloats(random, RowsOf(attention) * params.q_heads * params.layer.key_dim);
    if (s.rotate) SetUpRotation();
  }

  // What row `row` of chunk `chunk` should be for q head `head`; `q` is its row of the batch.
  ReferenceRow Expected(size_t chunk, int32_t token, int32_t head, int64_t row) const {
    const AttentionParams& p = attention.params;
    const float* const q = &attention.q[(row * p.q_heads + head) * p.layer.key_dim];
    const ReferenceQuery query{{q, q + p.layer.key_dim},
                               attention.chunks[chunk].position + token,
                               head / shape_.group,
                               p.scale,
                               p.window,
                               p.sinks,
                               p.key_begin,
                               p.key_end};
    return Attention(query, keys_.empty() ? sequences_[chunk].keys() : keys_[chunk],
                     sequences_[chunk].values());
  }

  // Multiplies the scale of every key and of every value that is there. Not known to Expected.
  void MultiplyScales(float keys, float values) {
    const KvLayer& layer = attention.params.layer;
    for (const PagedKv& kv : sequences_) {
      for (int32_t token = 0; token < kv.tokens(); ++token) {
        if (kv.table()[token / layer.block_tokens] == nullptr) continue;
        for (int32_t i = 0; i < 2 * layer.kv_heads; ++i) {
          std::byte* const at = kv.ScaleAt(token, i / 2, i % 2 != 0);
          float scale;
          std::memcpy(&scale, at, sizeof(scale));
          scale *= i % 2 != 0 ? values : keys;
          std::memcpy(at, &scale, sizeof(scale));
        }
      }
    }
  }

  AttentionCase attention;

 private:
  void SetUpRotation() {
    const KvLayer& layer = attention.params.layer;
    KeyRotation& rotation = attention.params.rotation;
    rotation.begin = shape_.rope_dim == 0 ? 0 : shape_.dim;
    rotation.dim = shape_.rope_dim == 0 ? layer.key_dim / 2 * 2 : shape_.rope_dim;
    const RopeConfig config{.dim = rotation.dim, .theta = 500, .llama3 = {}};
    const std::vector<double> frequencies = Frequencies(config);
    std::vector<int32_t> positions(500);
    for (int32_t i = 0; i < 500; ++i) positions[i] = i;
    cos_sin_.resize(positions.size() * rotation.dim);
    ThreadPool pool(1);
    RopeAngles({pool, Isa::kPortable}, InverseFrequencies(config), positions, cos_sin_.data());
    rotation.cos_sin = cos_sin_.data();
    for (const PagedKv& kv : sequences_) {
      keys_.push_back(kv.keys());
      for (int32_t t = 0; t < kv.tokens(); ++t) {
        for (auto& key : keys_.back()[t]) {
          Rotate(key, rotation.begin, rotation.dim, t, frequencies);
        }
      }
    }
  }

  const Shape shape_;
  std::vector<PagedKv> sequences_;
  std::vector<HeadRows> keys_;  // rotated
  std::vector<float> cos_sin_;
};

// The largest difference from the reference; a NaN counts as infinite.
double Difference(const Batch& batch, const AttentionResult& result) {
  const AttentionParams& p = batch.attention.params;
  double worst = 0;
  const auto compare = [&](double expected, float got) {
    if (expected == got) return;
    const double difference = std::abs(expected - got);
    worst = difference <= worst      ? worst
            : std::isnan(difference) ? std::numeric_limits<double>::infinity()
                                     : difference;
  };
  int64_t row = 0;
  for (size_t chunk = 0; chunk < batch.attention.chunks.size(); ++chunk) {
    for (int32_t token = 0; token < batch.attention.chunks[chunk].tokens; ++token, ++row) {
      for (int32_t head = 0; head < p.q_heads; ++head) {
        const ReferenceRow expected = batch.Expected(chunk, token, head, row);
        const int64_t at = row * p.q_heads + head;
        compare(expected.lse, result.lse[at]);
        for (int32_t i = 0; i < p.layer.value_dim; ++i) {
          compare(expected.out[i], result.out[at * p.layer.value_dim + i]);
        }
      }
    }
  }
  return worst;
}

class AttentionTest : public IsaTest {};
INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, ::testing::ValuesIn(kIsas), NameOf);

TEST_P(AttentionTest, RandomShapesAgreeWithTheFormula) {
  for (uint32_t seed = 1; seed <= 100; ++seed) {
    const Shape shape = RandomShape(seed);
    const Batch batch(shape);
    ASSERT_LT(Difference(batch, RunAttention(batch.attention, GetParam(), shape.threads)), 1e-5)
        << shape;
  }
}

// Every head dim and storage type that models have, one decode step and one prefill each.
TEST_P(AttentionTest, EveryHeadDimAndStorageType) {
  for (const DType dtype : kDTypes) {
    for (const int32_t dim : {32, 64, 80, 96, 128, 256}) {
      Shape shape{.seed = 7,
                  .dtype = dtype,
                  .kv_heads = 2,
                  .group = 4,
                  .dim = dim,
                  .chunks = {{299, 1}, {0, 40}}};
      const Batch batch(shape);
      ASSERT_LT(Difference(batch, RunAttention(batch.attention, GetParam(), 2)), 1e-5) << shape;
    }
  }
}

TEST_P(AttentionTest, DeepSeeksLatentRows) {
  for (const DType dtype : {DType::kBf16, DType::kF8E4M3, DType::kI8}) {
    Shape shape{.seed = 3,
                .dtype = dtype,
                .group = 128,
                .dim = 512,
                .rope_dim = 64,
                .chunks = {{300, 1}, {5, 2}}};
    const Batch batch(shape);
    ASSERT_LT(Difference(batch, RunAttention(batch.attention, GetParam(), 2)), 1e-5) << shape;
  }
}

// Scores far beyond what exp can take.
TEST_P(AttentionTest, LargeScores) {
  for (const DType dtype : {DType::kF32, DType::kF8E4M3, DType::kI8}) {
    Shape shape{.seed = 5, .dtype = dtype, .group = 4, .chunks = {{600, 1}, {280, 9}}};
    Batch batch(shape);
    batch.attention.params.scale = 100;
    // lse is some thousands here, and float32 has 2.4e-4 to the last place of 4,000.
    ASSERT_LT(Difference(batch, RunAttention(batch.attention, GetParam(), 1)), 2e-2) << shape;
  }
}

TEST_P(AttentionTest, AVisibleNanIsNotHidden) {
  const TestLayer layer = HeadsLayer(DType::kBf16, 1, 64, 16);
  const PagedKv kv(layer, 300, 1);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  AttentionCase c;
  c.params.layer = layer.layer;
  c.params.q_heads = 1;
  c.params.scale = 1;
  c.chunks = {{kv.table(), 299, 1}};
  std::mt19937 random(1);
  c.q = RandomFloats(random, 64);
  EXPECT_FALSE(std::isnan(RunAttention(c, GetParam(), 1).out[0]));
  std::memset(kv.At(100, 0, false), 0xff, 2);
  EXPECT_TRUE(std::isnan(RunAttention(c, GetParam(), 1).out[0]));
  EXPECT_TRUE(std::isnan(RunAttention(c, GetParam(), 1).lse[0]));
  c.q[5] = nan;
  EXPECT_TRUE(std::isnan(RunAttention(c, GetParam(), 1).out[0]));
}

// Scales are multiplied in after sums over codes, so powers of two in them are exact: whatever
// scales multiply, and each exactly once.
TEST_P(AttentionTest, PowersOfTwoInScalesAreExact) {
  for (uint32_t seed = 1; seed <= 8; ++seed) {
    Shape shape = RandomShape(seed);
    shape.dtype = seed % 2 == 0 ? DType::kF8E4M3 : DType::kI8;
    shape.rope_dim = 0;  // a latent row's scale is its key's and its value's
    Batch batch(shape);
    const AttentionResult before = RunAttention(batch.attention, GetParam(), shape.threads);
    batch.MultiplyScales(4, 0.5);
    for (float& q : batch.attention.q) q /= 4;
    AttentionResult after = RunAttention(batch.attention, GetParam(), shape.threads);
    for (float& x : after.out) x *= 2;
    ASSERT_EQ(before.out, after.out) << shape;
    ASSERT_EQ(before.lse, after.lse) << shape;
  }
}

TEST_P(AttentionTest, PartsOfTheKeysMergeIntoTheWhole) {
  ThreadPool pool(2);
  for (uint32_t seed = 1; seed <= 25; ++seed) {
    std::mt19937 random(seed);
    Shape shape = RandomShape(seed);
    if (shape.chunks.front().second == 0) continue;
    Batch batch(shape);
    AttentionCase part = batch.attention;
    std::vector<int32_t> cuts = {0, static_cast<int32_t>(random() % 500),
                                 static_cast<int32_t>(random() % 500), 1000};
    std::sort(cuts.begin(), cuts.end());
    std::vector<AttentionResult> parts;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      part.params.key_begin = cuts[i];
      part.params.key_end = cuts[i + 1];
      parts.push_back(RunAttention(part, GetParam(), shape.threads));
    }
    const float* outs[3] = {parts[0].out.data(), parts[1].out.data(), parts[2].out.data()};
    const float* lses[3] = {parts[0].lse.data(), parts[1].lse.data(), parts[2].lse.data()};
    AttentionResult merged = parts[0];
    MergeAttention({pool, GetParam()}, {.parts = 3,
                                        .rows = RowsOf(part) * part.params.q_heads,
                                        .dim = part.params.layer.value_dim,
                                        .outs = outs,
                                        .lses = lses,
                                        .out = merged.out.data(),
                                        .lse = merged.lse.data()});
    ASSERT_LT(Difference(batch, merged), 1e-5) << shape << " cut at " << cuts[1] << ", " << cuts[2];
  }
}

TEST_P(AttentionTest, NothingSeenIsZeroAndMinusInfinity) {
  Shape shape{.seed = 2, .kv_heads = 2, .group = 2, .chunks = {{300, 2}}};
  Batch batch(shape);
  batch.attention.params.key_begin = 400;
  const AttentionResult result = RunAttention(batch.attention, GetParam(), 2);
  for (const float x : result.out) ASSERT_EQ(x, 0);
  for (const float x : result.lse) ASSERT_EQ(x, -std::numeric_limits<float>::infinity());

  // Such a part has no say in a merge, whatever lies in its out.
  ThreadPool pool(1);
  const std::vector<float> nan(3, std::numeric_limits<float>::quiet_NaN());
  const std::vector<float> one = {1, 2, 3};
  const float none = -std::numeric_limits<float>::infinity();
  const float lse = 0.5;
  const float* outs[2] = {nan.data(), one.data()};
  const float* lses[2] = {&none, &lse};
  std::vector<float> out(3);
  float merged = 0;
  MergeAttention({pool, GetParam()}, {2, 1, 3, outs, lses, out.data(), &merged});
  EXPECT_EQ(out, one);
  EXPECT_EQ(merged, lse);
  lses[1] = &none;
  MergeAttention({pool, GetParam()}, {2, 1, 3, outs, lses, out.data(), &merged});
  EXPECT_EQ(out, std::vector<float>(3, 0.0f));
  EXPECT_EQ(merged, none);
}

}  // namespace
}  // namespace larder::kernels::testing
