// One call of Decode over random sequences and what the formula makes of it.
//
// Thread safety: none.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/plan.h"
#include "tests/gpu/device_kv.h"

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

struct DecodeResult {
  std::vector<double> out;  // [rows][q_heads][value_dim]
  std::vector<float> lse;   // [rows][q_heads]
};

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

  DecodeResult Run() {
    using namespace kernels::cuda;  // NOLINT: names of what is tested
    std::vector<DecodeRow> rows;
    for (int i = 0; i < this->rows(); ++i) rows.push_back({i, i, shape_.positions[i]});
    int32_t blocks = 0;
    Require(DecodeBlocksAtOnce(params_.layer, params_.q_heads, &blocks), "DecodeBlocksAtOnce");
    const DecodePlan plan = PlanDecode(rows, {.kv_heads = shape_.kv_heads,
                                              .window = shape_.window,
                                              .sinks = shape_.sinks,
                                              .key_begin = shape_.key_begin,
                                              .key_end = shape_.key_end,
                                              .blocks_at_once = blocks,
                                              .piece_tokens = shape_.piece_tokens});
    const DeviceArray<DecodePiece> pieces(plan.pieces);
    const DeviceArray<DecodeGroup> groups(plan.groups);
    DecodeParams p = params_;
    p.plan = {pieces.data(), groups.data(), static_cast<int32_t>(plan.pieces.size()),
              static_cast<int32_t>(plan.groups.size()), plan.slots};
    const int bytes = kernels::BytesOf(shape_.QueryType());
    std::vector<std::byte> q(q_.size() * bytes);
    for (size_t i = 0; i < q_.size(); ++i) {
      if (std::isnan(q_[i]))
        std::memset(&q[i * bytes], 0xff, bytes);
      else
        kernels::testing::Encode(shape_.QueryType(), q_[i], &q[i * bytes]);
    }
    const DeviceArray<std::byte> device_q(q);
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
    DecodeResult result;
    const std::vector<std::byte> bits = out.Host();
    for (int r = 0; r < this->rows(); ++r) {
      for (int64_t i = 0; i < p.out_stride; ++i) {
        const double x = kernels::testing::Decoded(
            p.out_dtype, &bits[(r * p.out_stride + i) * kernels::BytesOf(p.out_dtype)]);
        if (i < values)
          result.out.push_back(x);
        else
          Expect(std::isnan(x), "nothing is written between rows: " + shape_.Literal());
      }
    }
    result.lse = lse.Host();
    const std::vector<std::byte> after = workspace.Host();
    Expect(std::all_of(after.begin(), after.begin() + static_cast<int64_t>(DecodeCounterBytes(p)),
                       [](std::byte b) { return b == std::byte{0}; }),
           "counters are zero again: " + shape_.Literal());
    return result;
  }

  // Each weight is rounded to the storage type, so an out may be off by that part of the sum of
  // weight * |value|; sums in float32 add little to it, and `absolute` is allowed besides.
  void ExpectCorrect(const DecodeResult& result, double absolute = 2e-6) {
    const kernels::cuda::DecodeParams& p = params_;
    const double rounding = shape_.dtype == DType::kBf16 ? 0x1p-8 : 0x1p-11;
    for (int r = 0; r < rows(); ++r) {
      const TestSequence& sequence = kv_.sequences()[r];
      HeadRows magnitudes = sequence.values;
      for (auto& token : magnitudes) {
        for (auto& head : token) {
          for (double& x : head) x = std::abs(x);
        }
      }
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
        const auto expected = kernels::testing::Attention(query, sequence.keys, sequence.values);
        const auto size = kernels::testing::Attention(query, sequence.keys, magnitudes);
        const int64_t at = int64_t{r} * p.q_heads + h;
        ExpectWithin(Distance(expected.lse, result.lse[at]), 2e-5 + 2e-6 * std::abs(expected.lse),
                     "lse " + shape_.Literal());
        double worst = 0;
        for (int i = 0; i < p.layer.value_dim; ++i) {
          double allowed = (rounding + 2e-6) * size.out[i] + absolute;
          if (!shape_.out_f32) allowed += rounding * std::abs(expected.out[i]);
          worst = std::max(
              worst, Distance(expected.out[i], result.out[at * p.layer.value_dim + i]) / allowed);
        }
        ExpectWithin(worst, 1, "out " + shape_.Literal());
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
