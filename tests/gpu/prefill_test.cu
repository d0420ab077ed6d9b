// Prefill over keys and values of heads against the formula in double precision, and its plan.
#include <map>
#include <set>
#include <tuple>

#include "kernels/cuda/prefill.h"
#include "tests/gpu/attention_check.h"

namespace larder::gpu_tests {
namespace {

using kernels::cuda::kPrefillRowsLarge;
using kernels::cuda::kPrefillRowsSmall;
using kernels::cuda::PrefillParams;
using kernels::cuda::PrefillPlan;
using kernels::cuda::PrefillTile;

// Prints as a literal.
struct Shape {
  uint32_t seed = 0;
  DType dtype = DType::kBf16;
  int32_t kv_heads = 1;
  int32_t group = 1;
  int32_t dim = 64;
  int32_t block_tokens = 16;
  bool token_major = false;
  int32_t window = 0;
  int32_t sinks = 0;
  int32_t key_begin = 0;
  int32_t key_end = std::numeric_limits<int32_t>::max();
  int32_t tile_rows = kPrefillRowsSmall;
  bool out_f32 = true;
  double spread = 1;
  std::vector<std::pair<int32_t, int32_t>> chunks = {};  // position, tokens >= 1; different ends

  DType QueryType() const { return kernels::IsQuantised(dtype) ? DType::kF16 : dtype; }
  std::string Literal() const {
    std::string text =
        "{" + std::to_string(seed) + ", DType{" + std::to_string(static_cast<int>(dtype)) + "}";
    for (const int32_t x : {kv_heads, group, dim, block_tokens, int32_t{token_major}, window, sinks,
                            key_begin, key_end, tile_rows, int32_t{out_f32}}) {
      text += ", " + std::to_string(x);
    }
    text += ", " + std::to_string(spread) + ", {";
    for (const auto& [position, tokens] : chunks) {
      text += "{" + std::to_string(position) + ", " + std::to_string(tokens) + "}, ";
    }
    return text + "}}";
  }
};

std::vector<int32_t> LastPositions(const Shape& s) {
  std::vector<int32_t> last;
  for (const auto& [position, tokens] : s.chunks) last.push_back(position + tokens - 1);
  return last;
}

// Seen by some row of the chunk that ends at `last`.
DeviceKv::IsVisible SeenBy(const Shape& s) {
  std::map<int32_t, int32_t> first_of;
  for (const auto& [position, tokens] : s.chunks) first_of[position + tokens - 1] = position;
  return [s, first_of](int32_t last, int32_t token) {
    const bool in_window = s.window == 0 || token > first_of.at(last) - s.window || token < s.sinks;
    return token <= last && token >= s.key_begin && token < s.key_end && in_window;
  };
}

// One call of Prefill over random sequences and what the formula makes of it.
class PrefillCase {
 public:
  explicit PrefillCase(const Shape& s)
      : shape_(s),
        test_(HeadsLayer(s.dtype, s.kv_heads, s.dim, s.block_tokens, s.token_major)),
        kv_(test_, LastPositions(s), SeenBy(s), s.seed, s.spread) {
    params_.layer = test_.layer;
    params_.q_heads = s.kv_heads * s.group;
    params_.scale = 1 / std::sqrt(static_cast<float>(s.dim));
    params_.window = s.window;
    params_.sinks = s.sinks;
    params_.key_begin = s.key_begin;
    params_.key_end = s.key_end;
    params_.out_dtype = s.out_f32 ? DType::kF32 : s.QueryType();
    params_.q_stride = int64_t{params_.q_heads} * s.dim + 8;
    params_.out_stride = int64_t{params_.q_heads} * s.dim + 2;
    chunks_.resize(s.chunks.size());
    Require(cudaMemcpy(chunks_.data(), kv_.chunks(), chunks_.size() * sizeof(SequenceChunk),
                       cudaMemcpyDeviceToHost),
            "cudaMemcpy");
    std::normal_distribution<double> normal(0, s.spread);
    for (size_t i = 0; i < chunks_.size(); ++i) {
      chunks_[i].position = s.chunks[i].first;
      chunks_[i].tokens = s.chunks[i].second;
      for (int32_t t = 0; t < chunks_[i].tokens; ++t) {
        // A token's query depends on its sequence and position, not on the chunk.
        std::mt19937 random(s.seed * 1000 + static_cast<uint32_t>(chunks_[i].position + t));
        for (int64_t n = 0; n < params_.q_stride; ++n) {
          q_.push_back(kernels::testing::Rounded(s.QueryType(), normal(random)));
        }
      }
      rows_ += chunks_[i].tokens;
    }
  }

  PrefillParams& params() { return params_; }
  std::vector<double>& q() { return q_; }
  // Pretends that chunk i were this one; its end may not be later.
  void Cut(size_t i, int32_t position, int32_t tokens) {
    chunks_[i].position = position;
    chunks_[i].tokens = tokens;
  }

  AttentionResult Run() {
    PrefillPlan plan =
        kernels::cuda::PlanPrefill(chunks_, {shape_.kv_heads, shape_.group, shape_.dim,
                                             shape_.tile_rows == kPrefillRowsLarge ? 0 : 1 << 20,
                                             kernels::IsQuantised(shape_.dtype)});
    Expect(plan.tile_rows == shape_.tile_rows, "tile rows: " + shape_.Literal());
    const DeviceArray<PrefillTile> tiles(plan.tiles);
    const DeviceArray<SequenceChunk> chunks(chunks_);
    const DeviceArray<std::byte> device_q(Encoded(shape_.QueryType(), q_));
    PrefillParams p = params_;
    const DeviceArray<std::byte> out(rows_ * p.out_stride * kernels::BytesOf(p.out_dtype));
    const DeviceArray<float> lse(static_cast<size_t>(rows_) * p.q_heads);
    p.q = device_q.data();
    p.out = out.data();
    p.lse = lse.data();
    p.chunks = chunks.data();
    p.plan = {tiles.data(), static_cast<int32_t>(plan.tiles.size()), plan.tile_rows};
    Require(Prefill(p, nullptr), "Prefill");
    AttentionResult result;
    result.out =
        ReadRows(out, p.out_dtype, p.out_stride, int64_t{p.q_heads} * shape_.dim, shape_.Literal());
    result.lse = lse.Host();
    return result;
  }

  // Weights are rounded to the storage type, of codes to f16.
  void ExpectCorrect(const AttentionResult& result, double absolute = Rounding{}.absolute) {
    const double type = RoundingOf(shape_.QueryType());
    const Rounding rounding{type, shape_.out_f32 ? 0 : type, absolute};
    int64_t row = 0;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const TestSequence& sequence = kv_.sequences()[c];
      const HeadRows magnitudes = Magnitudes(sequence.values);
      for (int32_t t = 0; t < chunks_[c].tokens; ++t, ++row) {
        const std::string literal = "of row " + std::to_string(row) + " " + shape_.Literal();
        for (int32_t h = 0; h < params_.q_heads; ++h) {
          const double* const q = &q_[row * params_.q_stride + int64_t{h} * shape_.dim];
          const kernels::testing::ReferenceQuery query{
              {q, q + shape_.dim}, chunks_[c].position + t, h / shape_.group,  params_.scale,
              params_.window,      params_.sinks,           params_.key_begin, params_.key_end};
          ExpectRow(query, sequence, magnitudes, result, row * params_.q_heads + h, rounding,
                    literal);
          if (state.failures > 3) return;
        }
      }
    }
  }

 private:
  const Shape shape_;
  const TestLayer test_;
  const DeviceKv kv_;
  std::vector<SequenceChunk> chunks_;
  PrefillParams params_;
  std::vector<double> q_;  // [rows][q_stride]
  int64_t rows_ = 0;
};

Shape RandomShape(uint32_t seed) {
  std::mt19937 random(seed);
  Shape s;
  s.seed = seed;
  s.dtype = Pick(random, {DType::kF16, DType::kBf16});
  s.kv_heads = Pick(random, {1, 1, 2, 3});
  s.group = Pick(random, {1, 2, 3, 4, 4, 7, 8});
  s.dim = Pick(random, {16, 32, 64, 64, 80, 96, 128, 256});
  s.block_tokens = Pick(random, {1, 3, 8, 16, 16, 64, 100});
  s.token_major = random() % 4 == 0;
  if (random() % 2 == 0) {
    s.window = static_cast<int32_t>(1 + random() % 200);
    s.sinks = static_cast<int32_t>(random() % 40);
  }
  if (random() % 4 == 0) {
    s.key_begin = static_cast<int32_t>(random() % 100);
    s.key_end = s.key_begin + static_cast<int32_t>(random() % 300);
  }
  s.tile_rows =
      s.dim > 128 ? kPrefillRowsSmall : Pick(random, {kPrefillRowsSmall, kPrefillRowsLarge});
  s.out_f32 = random() % 3 != 0;
  std::set<int32_t> ends;
  const int chunks = static_cast<int>(1 + random() % 3);
  for (int i = 0; i < chunks; ++i) {
    const int32_t position = Pick(random, {0, 0, 1, 16, 63, 64, 130, 300});
    int32_t tokens = Pick(random, {1, 2, 5, 16, 17, 40, 70});
    while (!ends.insert(position + tokens).second) ++tokens;
    s.chunks.emplace_back(position, tokens);
  }
  return s;
}

void RandomShapes(uint32_t seed) {
  PrefillCase c(RandomShape(seed));
  c.ExpectCorrect(c.Run());
}

constexpr DType kCodes[] = {DType::kF8E4M3, DType::kI8};

// What RandomShape draws, over codes.
void RandomShapesOfCodes(uint32_t seed) {
  Shape s = RandomShape(seed + 100);
  s.dtype = kCodes[seed % 2];
  s.dim = s.dim < 64 ? 64 : s.dim == 80 ? 96 : s.dim;
  s.tile_rows = kPrefillRowsSmall;
  PrefillCase c(s);
  c.ExpectCorrect(c.Run());
}

// As decode's: values whose scales are far below what f16 resolves.
void SmallScales(uint32_t seed) {
  for (const DType dtype : kCodes) {
    PrefillCase c(
        {.seed = seed, .dtype = dtype, .group = 4, .spread = 1e-3, .chunks = {{1500, 20}}});
    c.params().scale = 0;
    c.ExpectCorrect(c.Run(), /*absolute=*/2e-9);
  }
}

// Values of zeros have scales of zero; keys of zeros see all tokens alike.
void RowsOfZeros(uint32_t seed) {
  PrefillCase c({.seed = seed, .dtype = DType::kI8, .group = 2, .spread = 0, .chunks = {{40, 1}}});
  const AttentionResult result = c.Run();
  for (const double x : result.out) Expect(x == 0, "the mean of zeros is 0");
  for (const float x : result.lse)
    ExpectWithin(Distance(std::log(41.0), x), 1e-5, "lse of 41 equal scores");
}

void EveryHeadDim(uint32_t seed) {
  for (const DType dtype : {DType::kBf16, DType::kF16, DType::kF8E4M3, DType::kI8}) {
    const bool codes = kernels::IsQuantised(dtype);
    for (const int32_t dim : {16, 32, 64, 80, 96, 128, 256}) {
      if (codes && (dim < 64 || dim == 80)) continue;
      for (const int32_t tile_rows : {kPrefillRowsSmall, kPrefillRowsLarge}) {
        if ((codes || dim > 128) && tile_rows == kPrefillRowsLarge) continue;
        PrefillCase c({.seed = seed,
                       .dtype = dtype,
                       .group = 4,
                       .dim = dim,
                       .tile_rows = tile_rows,
                       .chunks = {{100, 40}}});
        c.ExpectCorrect(c.Run());
      }
    }
  }
}

// The same tokens in one chunk, as the end of one, and in tiles of either size: the same bits.
void ARowDoesNotDependOnItsChunk(uint32_t seed) {
  Shape s{.seed = seed, .kv_heads = 2, .group = 4, .chunks = {{70, 100}}};
  if (seed % 2 == 0) s.window = 50, s.sinks = 3;
  if (seed > 4) s.dtype = kCodes[seed / 2 % 2];
  PrefillCase whole(s);
  const AttentionResult expected = whole.Run();
  whole.ExpectCorrect(expected);
  if (!kernels::IsQuantised(s.dtype)) {
    s.tile_rows = kPrefillRowsLarge;
    PrefillCase large(s);
    const AttentionResult in_large_tiles = large.Run();
    Expect(in_large_tiles.out == expected.out && in_large_tiles.lse == expected.lse, "large tiles");
    s.tile_rows = kPrefillRowsSmall;
  }
  constexpr int32_t kSkipped = 37;
  PrefillCase part(s);
  part.Cut(0, 70 + kSkipped, 100 - kSkipped);
  part.q().erase(part.q().begin(), part.q().begin() + kSkipped * part.params().q_stride);
  part.q().resize(100 * part.params().q_stride, 0);  // the rows that nobody computes now
  const AttentionResult rest = part.Run();
  const int64_t numbers = int64_t{kSkipped} * part.params().q_heads * s.dim;
  Expect(std::equal(expected.out.begin() + numbers, expected.out.end(), rest.out.begin()) &&
             std::equal(expected.lse.begin() + kSkipped * part.params().q_heads, expected.lse.end(),
                        rest.lse.begin()),
         "the end of a chunk");
}

// Where there is no shared memory for a large tile two blocks share it: the same bits.
void LessSharedMemoryTheSameBits(uint32_t seed) {
  PrefillCase c({.seed = seed,
                 .group = 4,
                 .dim = 128,
                 .tile_rows = kPrefillRowsLarge,
                 .chunks = {{30, 50}, {7, 10}}});
  const AttentionResult expected = c.Run();
  const SharedBytesMax less(99 * 1024);
  const AttentionResult got = c.Run();
  Expect(got.out == expected.out && got.lse == expected.lse, "the same bits with 99 KiB");
}

void LargeScores(uint32_t seed) {
  for (const DType dtype : {DType::kBf16, DType::kF8E4M3}) {
    PrefillCase c({.seed = seed, .dtype = dtype, .group = 4, .spread = 20, .chunks = {{200, 20}}});
    for (const double x : c.Run().out) Expect(std::isfinite(x) && std::abs(x) < 400, "a value");
    c.params().scale = 0;  // the mean of all values
    c.ExpectCorrect(c.Run());
  }
}

void NothingSeenIsZeroAndMinusInfinity(uint32_t seed) {
  for (const DType dtype : {DType::kBf16, DType::kI8}) {
    PrefillCase c({.seed = seed,
                   .dtype = dtype,
                   .kv_heads = 2,
                   .group = 3,
                   .key_begin = 400,
                   .chunks = {{300, 30}}});
    ExpectNothingSeen(c.Run());
  }
}

void AVisibleNanIsNotHidden(uint32_t seed) {
  for (const DType dtype : {DType::kBf16, DType::kF8E4M3}) {
    PrefillCase c({.seed = seed, .dtype = dtype, .group = 2, .chunks = {{200, 9}}});
    c.q()[3] = std::nan("");
    ExpectNanOfFirstHead(c.Run());
  }
}

void OtherShapesAreRefused(uint32_t seed) {
  PrefillCase c({.seed = seed, .chunks = {{5, 3}}});
  const auto refused = [&](const char* what, auto change) {
    PrefillParams p = c.params();
    p.plan.tile_rows = kPrefillRowsSmall;
    change(p);
    Expect(Prefill(p, nullptr) == cudaErrorInvalidValue, what);
  };
  refused("a head dim of 72", [](PrefillParams& p) { p.layer.key_dim = p.layer.value_dim = 72; });
  refused("float32 storage", [](PrefillParams& p) { p.layer.dtype = DType::kF32; });
  refused("1 q head for 2 kv heads", [](PrefillParams& p) { p.layer.kv_heads = 2; });
  refused("rows aligned to 8 bytes", [](PrefillParams& p) { p.layer.token_stride_bytes += 8; });
  refused("tiles of 32 rows", [](PrefillParams& p) { p.plan.tile_rows = 32; });
  refused("large tiles of large heads", [](PrefillParams& p) {
    p.layer.key_dim = p.layer.value_dim = 256;
    p.plan.tile_rows = kPrefillRowsLarge;
  });
  refused("codes of a head dim of 80", [](PrefillParams& p) {
    p.layer.dtype = DType::kI8;
    p.layer.key_dim = p.layer.value_dim = 80;
  });
  refused("large tiles of codes", [](PrefillParams& p) {
    p.layer.dtype = DType::kF8E4M3;
    p.plan.tile_rows = kPrefillRowsLarge;
  });
  refused("scales aligned to 2", [](PrefillParams& p) {
    p.layer.dtype = DType::kI8;
    p.layer.value_scale_offset_bytes += 2;
  });
}

void PlansCoverEachPairOnce(uint32_t seed) {
  std::mt19937 random(seed);
  const int32_t group = Pick(random, {1, 3, 4, 8});
  std::vector<SequenceChunk> chunks(1 + random() % 4);
  int64_t pairs = 0;
  std::vector<int32_t> rows;
  int32_t row = 0;
  for (SequenceChunk& chunk : chunks) {
    chunk.position = Pick(random, {0, 10, 5000});
    chunk.tokens = Pick(random, {0, 1, 33, 64, 700});
    pairs += int64_t{chunk.tokens} * group;
    rows.push_back(row);
    row += chunk.tokens;
  }
  const PrefillPlan plan =
      kernels::cuda::PlanPrefill(chunks, {2, group, 128, Pick(random, {0, 132})});
  std::set<std::tuple<int32_t, int32_t>> seen;
  int64_t last = std::numeric_limits<int64_t>::max();
  for (const PrefillTile& tile : plan.tiles) {
    Expect(tile.row == rows[tile.chunk], "a tile knows its chunk's first row");
    int32_t end = 0;
    for (int32_t pair = tile.pair; pair < tile.pair + plan.tile_rows; ++pair) {
      if (pair >= chunks[tile.chunk].tokens * group) break;
      Expect(seen.emplace(tile.chunk, pair).second, "a pair in two tiles");
      end = chunks[tile.chunk].position + pair / group;
    }
    Expect(end <= last, "a tile with more keys comes later");
    last = end;
  }
  Expect(static_cast<int64_t>(seen.size()) == pairs, "a pair in no tile");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(
      argc, argv,
      std::vector<Case>{
          {"plans_cover_each_pair_once", 40, PlansCoverEachPairOnce},
          {"random_shapes", 40, RandomShapes},
          {"random_shapes_of_codes", 30, RandomShapesOfCodes},
          {"every_head_dim", 1, EveryHeadDim},
          {"small_scales", 1, SmallScales},
          {"rows_of_zeros", 1, RowsOfZeros},
          {"a_row_does_not_depend_on_its_chunk", 8, ARowDoesNotDependOnItsChunk},
          {"large_scores", 1, LargeScores},
          {"less_shared_memory_the_same_bits", 1, LessSharedMemoryTheSameBits},
          {"nothing_seen_is_zero_and_minus_infinity", 1, NothingSeenIsZeroAndMinusInfinity},
          {"a_visible_nan_is_not_hidden", 1, AVisibleNanIsNotHidden},
          {"other_shapes_are_refused", 1, OtherShapesAreRefused}});
}
