// One call of Decode over random sequences and what the formula makes of it.
//
// Thread safety: none.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/plan.h"
#include "tests/gpu/attention_check.h"

namespace larder::gpu_tests {

// Prints as a literal.
struct DecodeShapeCase {
  uint32_t seed = 0;
  DType dtype = DType::kBf16;
  int32_t kv_heads = 1;
  int32_t group = 1;
  int32_t dim = 64;      // of a head; of a latent vector
  int32_t rope_dim = 0;  // of MLA; 0: heads
  int32_t block_tokens = 16;
  bool token_major = false;
  int32_t window = 0;
  int32_t sinks = 0;
  int32_t key_begin = 0;
  int32_t key_end = std::numeric_limits<int32_t>::max();
  int32_t piece_tokens = 0;
  bool out_f32 = true;
  double spread = 1;
  std::vector<int32_t> positions = {};

  std::string Literal() const {
    std::string text = "{";
    const auto add = [&](auto x) { text += std::to_string(x) + ", "; };
    text += std::to_string(seed) + ", DType{" + std::to_string(static_cast<int>(dtype)) + "}, ";
    for (const int32_t x : {kv_heads, group, dim, rope_dim, block_tokens, int32_t{token_major},
                            window, sinks, key_begin, key_end, piece_tokens, int32_t{out_f32}}) {
      add(x);
    }
    add(spread);
    text += "{";
    for (const int32_t p : positions) add(p);
    return text + "}}";
  }

  DType QueryType() const { return kernels::IsQuantised(dtype) ? DType::kF16 : dtype; }
  bool Visible(int32_t position, int32_t token) const {
    return token <= position && token >= key_begin && token < key_end &&
           (window == 0 || token > position - window || token < sinks);
  }
};

// The part of a random shape that all head storage has: what is seen, and how it is cut.
inline void DrawSight(std::mt19937& random, DecodeShapeCase& s) {
  if (random() % 2 == 0) {
    s.window = static_cast<int32_t>(1 + random() % 300);
    s.sinks = static_cast<int32_t>(random() % 40);
  }
  if (random() % 4 == 0) {
    s.key_begin = static_cast<int32_t>(random() % 100);
    s.key_end = s.key_begin + static_cast<int32_t>(random() % 400);
  }
  s.piece_tokens = Pick(random, {0, 0, 64, 128, 256});
  s.out_f32 = random() % 3 != 0;
}

class DecodeCase {
 public:
  explicit DecodeCase(const DecodeShapeCase& s)
      : shape_(s),
        random_(s.seed),
        test_(s.rope_dim == 0
                  ? HeadsLayer(s.dtype, s.kv_heads, s.dim, s.block_tokens, s.token_major)
                  : LatentLayer(s.dtype, s.dim, s.rope_dim, s.block_tokens)),
        kv_(
            test_, s.positions, [&](int32_t p, int32_t t) { return s.Visible(p, t); }, s.seed,
            s.spread) {
    const KvLayer& layer = test_.layer;
    params_.layer = layer;
    params_.q_heads = s.kv_heads * s.group;
    params_.scale = 1 / std::sqrt(static_cast<float>(layer.key_dim));
    params_.window = s.window;
    params_.sinks = s.sinks;
    params_.out_dtype = s.out_f32 ? DType::kF32 : s.QueryType();
    params_.chunks = kv_.chunks();
    q_stride_ = int64_t{params_.q_heads} * layer.key_dim + 8;
    std::normal_distribution<double> normal(0, s.spread);
    for (int64_t i = 0; i < q_stride_ * rows(); ++i) {
      q_.push_back(kernels::testing::Rounded(s.QueryType(), normal(random_)));
    }
  }

  kernels::cuda::DecodeParams& params() { return params_; }
  const DeviceKv& kv() const { return kv_; }
  std::vector<double>& q() { return q_; }
  int rows() const { return static_cast<int>(shape_.positions.size()); }

  AttentionResult Run() {
    using namespace kernels::cuda;  // NOLINT: names of what is tested
    std::vector<DecodeRow> rows;
    for (int i = 0; i < this->rows(); ++i) rows.push_back({i, i, shape_.positions[i]});
    int32_t blocks = 0;
    Require(DecodeBlocksAtOnce(params_.layer, params_.q_heads, &blocks), "DecodeBlocksAtOnce");
    DecodePlan plan = PlanDecode(rows, {.kv_heads = shape_.kv_heads,
                                        .window = shape_.window,
                                        .sinks = shape_.sinks,
                                        .key_begin = shape_.key_begin,
                                        .key_end = shape_.key_end,
                                        .blocks_at_once = blocks,
                                        .piece_tokens = shape_.piece_tokens});
    // More than there is to do, as a step has that is launched like others.
    const uint32_t spare = random_() % 4;
    plan.pieces.resize(plan.pieces.size() + spare, {.row = -1});
    plan.groups.resize(plan.groups.size() + spare);
    plan.slots += static_cast<int32_t>(spare);
    const DeviceArray<DecodePiece> pieces(plan.pieces);
    const DeviceArray<DecodeGroup> groups(plan.groups);
    DecodeParams p = params_;
    p.plan = {pieces.data(), groups.data(), static_cast<int32_t>(plan.pieces.size()),
              static_cast<int32_t>(plan.groups.size()), plan.slots};
    const DeviceArray<std::byte> device_q(Encoded(shape_.QueryType(), q_));
    p.q = device_q.data();
    p.q_stride = q_stride_;
    const int64_t values = int64_t{p.q_heads} * p.layer.value_dim;
    p.out_stride = values + 3;
    const DeviceArray<std::byte> out(this->rows() * p.out_stride * kernels::BytesOf(p.out_dtype));
    const DeviceArray<float> lse(size_t(this->rows()) * p.q_heads);
    p.out = out.data();
    p.lse = lse.data();
    DeviceArray<std::byte> workspace(DecodeWorkspaceBytes(p));
    Require(cudaMemset(workspace.data(), 0, DecodeCounterBytes(p)), "cudaMemset");
    p.workspace = workspace.data();
    Require(Decode(p, nullptr), "Decode");
    AttentionResult result;
    result.out = ReadRows(out, p.out_dtype, p.out_stride, values, shape_.Literal());
    result.lse = lse.Host();
    const std::vector<std::byte> after = workspace.Host();
    Expect(std::all_of(after.begin(), after.begin() + static_cast<int64_t>(DecodeCounterBytes(p)),
                       [](std::byte b) { return b == std::byte{0}; }),
           "counters are zero again: " + shape_.Literal());
    return result;
  }

  // Weights are rounded to the storage type; `absolute`: see Rounding.
  void ExpectCorrect(const AttentionResult& result, double absolute = Rounding().absolute) {
    const kernels::cuda::DecodeParams& p = params_;
    const double type = RoundingOf(shape_.dtype);
    const Rounding rounding{type, shape_.out_f32 ? 0 : type, absolute};
    for (int r = 0; r < rows(); ++r) {
      const TestSequence& sequence = kv_.sequences()[r];
      const HeadRows magnitudes = Magnitudes(sequence.values);
      for (int h = 0; h < p.q_heads; ++h) {
        const auto* const q = &q_[r * q_stride_ + int64_t{h} * p.layer.key_dim];
        const kernels::testing::ReferenceQuery query{{q, q + p.layer.key_dim},
                                                     sequence.position,
                                                     h / shape_.group,
                                                     p.scale,
                                                     p.window,
                                                     p.sinks,
                                                     shape_.key_begin,
                                                     shape_.key_end};
        ExpectRow(query, sequence, magnitudes, result, int64_t{r} * p.q_heads + h, rounding,
                  shape_.Literal());
        if (state.failures > 3) return;
      }
    }
  }

 private:
  const DecodeShapeCase shape_;
  std::mt19937 random_;
  const TestLayer test_;
  DeviceKv kv_;
  kernels::cuda::DecodeParams params_;
  int64_t q_stride_ = 0;
  std::vector<double> q_;  // [rows][q_stride]
};

}  // namespace larder::gpu_tests
