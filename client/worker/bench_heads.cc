// Experiment "heads": what keys and values cost by the way heads share them, at equal width: 16
// query heads of 64 numbers. One layer of decoding one token, straight on the kernels.
//
//   MHA   16 K/V heads              GQA   4            MQA   1
//   MLA   a latent of 256 numbers and 32 rotated ones a token (4 and 1/2 head dims, as DeepSeek-V2
//         has them), attended to in the absorbed form: W_uk goes into the query, W_uv into what
//         follows, so no key or value is ever expanded
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/bench.h"
#include "kernels/attention.h"
#include "kernels/blocks.h"
#include "kernels/cpu.h"
#include "kernels/kv_layout.h"
#include "kernels/thread_pool.h"

namespace larder::worker::bench {
namespace {

using kernels::DType;
using SteadyClock = std::chrono::steady_clock;

constexpr int32_t kHeads = 16;
constexpr int32_t kHeadDim = 64;
constexpr int32_t kLatentDim = 4 * kHeadDim;
constexpr int32_t kRopeDim = kHeadDim / 2;
constexpr int32_t kBlockTokens = 16;
// Decoded in turn, so that no layer is in the processor's caches when its turn comes.
constexpr int32_t kLayers = 8;
constexpr int32_t kContexts[] = {512, 1'024, 2'048, 4'096, 8'192};
constexpr int32_t kContextMax = 8'192;
constexpr int kRuns = 7;
constexpr uint64_t kSeed = 7;

std::vector<float> Draw(std::mt19937_64& random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> numbers(count);
  for (float& number : numbers) number = normal(random);
  return numbers;
}

// Blocks one after the other in one piece of memory.
class Blocks {
 public:
  Blocks(int64_t block_bytes, int64_t tokens) {
    const int64_t count = (tokens + kBlockTokens - 1) / kBlockTokens;
    memory_.resize(count * block_bytes + 64);
    auto address = reinterpret_cast<uintptr_t>(memory_.data());
    address = (address + 63) / 64 * 64;
    for (int64_t i = 0; i < count; ++i) {
      table_.push_back(reinterpret_cast<std::byte*>(address) + i * block_bytes);
    }
  }

  std::byte* const* table() const { return table_.data(); }
  // bf16 numbers near 1, whatever the layout is: the time does not depend on them.
  void Fill(std::mt19937_64& random) {
    for (size_t at = 0; at + 8 <= memory_.size(); at += 8) {
      const uint64_t four = 0x3f003f003f003f00 | (random() & 0x80ff80ff80ff80ff);
      std::memcpy(memory_.data() + at, &four, sizeof(four));
    }
  }

 private:
  std::vector<std::byte> memory_;
  std::vector<std::byte*> table_;
};

// Attend to one token at the end of `tokens`; out is [q_heads][value_dim].
std::vector<float> Decode(const kernels::Cpu& cpu, const kernels::KvLayer& layer,
                          const Blocks& blocks, const std::vector<float>& q, float scale,
                          int32_t tokens, std::vector<std::byte>& workspace) {
  std::vector<float> out(size_t{kHeads} * layer.value_dim);
  const kernels::SequenceChunk chunk{.blocks = blocks.table(), .position = tokens - 1, .tokens = 1};
  kernels::AttentionParams params;
  params.layer = layer;
  params.q_heads = kHeads;
  params.scale = scale;
  params.q = q.data();
  params.q_stride = static_cast<int64_t>(q.size());
  params.out = out.data();
  params.out_stride = static_cast<int64_t>(out.size());
  params.chunks = {&chunk, 1};
  workspace.resize(std::max(workspace.size(), kernels::AttentionWorkspaceBytes(cpu, params) + 64));
  void* base = workspace.data();
  size_t space = workspace.size();
  std::align(64, space - 64, base, space);
  kernels::Attend(cpu, params, {static_cast<std::byte*>(base), space});
  return out;
}

// --- The absorbed form gives what expanded heads give -------------------------------------------

// out[i] = sum over j of matrix[i][j] x[j].
void Multiply(const float* matrix, const float* x, int32_t rows, int32_t columns, float* out) {
  for (int32_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (int32_t j = 0; j < columns; ++j) sum += double{matrix[i * columns + j]} * x[j];
    out[i] = static_cast<float>(sum);
  }
}

void MultiplyTransposed(const float* matrix, const float* x, int32_t rows, int32_t columns,
                        float* out) {
  for (int32_t j = 0; j < columns; ++j) {
    double sum = 0;
    for (int32_t i = 0; i < rows; ++i) sum += double{matrix[i * columns + j]} * x[i];
    out[j] = static_cast<float>(sum);
  }
}

// The greatest difference of any number of the output, over the greatest number.
double AbsorbedDifference(const kernels::Cpu& cpu) {
  constexpr int32_t kTokens = 300;
  constexpr int32_t kKeyDim = kHeadDim + kRopeDim;
  constexpr int32_t kRow = kLatentDim + kRopeDim;
  std::mt19937_64 random(kSeed);
  const std::vector<float> rows = Draw(random, size_t{kTokens} * kRow);
  const std::vector<float> w_uk = Draw(random, size_t{kHeads} * kHeadDim * kLatentDim);
  const std::vector<float> w_uv = Draw(random, size_t{kHeads} * kHeadDim * kLatentDim);
  const std::vector<float> q = Draw(random, size_t{kHeads} * kKeyDim);
  const float scale = 0.1f / std::sqrt(float{kKeyDim * kLatentDim});

  // 1. Expanded: every head's keys and values, the values filled up with zeros to a key's length.
  std::vector<float> k(size_t{kTokens} * kHeads * kKeyDim), v(k.size());
  for (int32_t t = 0; t < kTokens; ++t) {
    const float* const row = rows.data() + t * kRow;
    for (int32_t h = 0; h < kHeads; ++h) {
      const size_t weights = size_t{kHeadDim} * kLatentDim * h;
      const size_t at = (size_t{kHeads} * t + h) * kKeyDim;
      Multiply(w_uk.data() + weights, row, kHeadDim, kLatentDim, k.data() + at);
      std::copy_n(row + kLatentDim, kRopeDim, k.data() + at + kHeadDim);
      Multiply(w_uv.data() + weights, row, kHeadDim, kLatentDim, v.data() + at);
    }
  }
  const kernels::HeadGeometry heads{DType::kF32, 1, kHeads, kKeyDim, kBlockTokens};
  const kernels::LatentGeometry latent{DType::kF32, 1, kLatentDim, kRopeDim, kBlockTokens};
  const Blocks expanded(kernels::BlockBytes(heads), kTokens);
  const Blocks absorbed(kernels::BlockBytes(latent), kTokens);
  const auto append = [&](const Blocks& blocks, const kernels::KvLayer& layer, const float* keys,
                          const float* values, int64_t stride) {
    const kernels::SequenceChunk chunk{.blocks = blocks.table(), .position = 0, .tokens = kTokens};
    kernels::AppendParams params;
    params.layer = layer;
    params.k = keys;
    params.k_stride = stride;
    params.v = values;
    params.v_stride = stride;
    params.chunks = {&chunk, 1};
    kernels::Append(cpu, params);
  };
  append(expanded, kernels::LayerOf(heads, 0), k.data(), v.data(), kHeads * kKeyDim);
  append(absorbed, kernels::LayerOf(latent, 0), rows.data(), nullptr, kRow);

  // 2. Absorbed: W_uk into the query, W_uv after the sum.
  std::vector<float> q_absorbed(size_t{kHeads} * kRow);
  for (int32_t h = 0; h < kHeads; ++h) {
    MultiplyTransposed(w_uk.data() + size_t{kHeadDim} * kLatentDim * h, q.data() + h * kKeyDim,
                       kHeadDim, kLatentDim, q_absorbed.data() + h * kRow);
    std::copy_n(q.data() + h * kKeyDim + kHeadDim, kRopeDim,
                q_absorbed.data() + h * kRow + kLatentDim);
  }
  std::vector<std::byte> workspace;
  const std::vector<float> want =
      Decode(cpu, kernels::LayerOf(heads, 0), expanded, q, scale, kTokens, workspace);
  const std::vector<float> latents =
      Decode(cpu, kernels::LayerOf(latent, 0), absorbed, q_absorbed, scale, kTokens, workspace);
  double difference = 0, greatest = 0;
  for (int32_t h = 0; h < kHeads; ++h) {
    float got[kHeadDim];
    Multiply(w_uv.data() + size_t{kHeadDim} * kLatentDim * h, latents.data() + h * kLatentDim,
             kHeadDim, kLatentDim, got);
    for (int32_t i = 0; i < kHeadDim; ++i) {
      difference = std::max(difference, std::abs(double{got[i]} - want[h * kKeyDim + i]));
      greatest = std::max(greatest, std::abs(double{got[i]}));
    }
  }
  return difference / greatest;
}

// --- Time ---------------------------------------------------------------------------------------

struct Kind {
  std::string name;
  int64_t block_bytes;
  kernels::KvLayer layers[kLayers];
};

template <typename Geometry>
Kind KindOf(std::string name, const Geometry& geometry) {
  Kind kind{.name = std::move(name), .block_bytes = kernels::BlockBytes(geometry), .layers = {}};
  for (int32_t i = 0; i < kLayers; ++i) kind.layers[i] = kernels::LayerOf(geometry, i);
  return kind;
}

// A layer's time for each context, in the order of kContexts.
std::vector<absl::Duration> Measure(const kernels::Cpu& cpu, const Kind& kind) {
  std::mt19937_64 random(kSeed);
  Blocks blocks(kind.block_bytes, kContextMax);
  blocks.Fill(random);
  const std::vector<float> q = Draw(random, size_t{kHeads} * kind.layers[0].key_dim);
  const float scale = 1 / std::sqrt(float{kHeadDim});
  std::vector<std::byte> workspace;
  std::vector<absl::Duration> times;
  for (const int32_t context : kContexts) {
    std::vector<absl::Duration> runs;
    for (int run = 0; run < kRuns; ++run) {
      const SteadyClock::time_point start = SteadyClock::now();
      for (const kernels::KvLayer& layer : kind.layers) {
        Decode(cpu, layer, blocks, q, scale, context, workspace);
      }
      runs.push_back(absl::FromChrono(SteadyClock::now() - start) / kLayers);
    }
    times.push_back(Median(runs));
  }
  return times;
}

}  // namespace

absl::Status RunHeads(Bench& bench) {
  kernels::ThreadPool pool;
  const kernels::Cpu cpu{.pool = pool};
  constexpr double kDifferenceMax = 1e-4;  // of float32 sums over 256 numbers
  const double difference = AbsorbedDifference(cpu);
  if (!(difference < kDifferenceMax)) {
    return absl::InternalError(
        absl::StrCat("heads: the absorbed form differs by ", difference, " from expanded heads"));
  }
  const auto heads = [](int32_t count) {
    return kernels::HeadGeometry{DType::kBf16, kLayers, count, kHeadDim, kBlockTokens};
  };
  const Kind kinds[] = {
      KindOf("MHA, 16 K/V heads", heads(16)), KindOf("GQA, 4 K/V heads", heads(4)),
      KindOf("MQA, 1 K/V head", heads(1)),
      KindOf("MLA, latent 256 + 32",
             kernels::LatentGeometry{DType::kBf16, kLayers, kLatentDim, kRopeDim, kBlockTokens})};
  Table table{.name = "heads",
              .heading = absl::StrCat("Decoding a token, one layer, ", kHeads, " query heads of ",
                                      kHeadDim, ", bf16 K/V; median of ", kRuns),
              .titles = {"K/V", "bytes a token and layer", "of MHA %"}};
  for (const int32_t context : kContexts) {
    table.titles.push_back(absl::StrCat("us at ", context, " tokens"));
  }
  table.titles.push_back(absl::StrCat("GB/s at ", kContextMax));
  Plot plot{.name = "heads",
            .title = "Attention of one decoded token, one layer",
            .x_label = "context (tokens)",
            .y_label = "time (us)",
            .x_log = true,
            .y_log = true};
  const int64_t of_mha = kinds[0].block_bytes;
  for (const Kind& kind : kinds) {
    const std::vector<absl::Duration> times = Measure(cpu, kind);
    const int64_t bytes = kind.block_bytes / kBlockTokens / kLayers;
    std::vector<std::string> row = {
        kind.name, absl::StrCat(bytes),
        Fixed(100.0 * static_cast<double>(kind.block_bytes) / static_cast<double>(of_mha), 1)};
    Curve curve{.title = kind.name};
    for (size_t i = 0; i < times.size(); ++i) {
      row.push_back(Fixed(absl::ToDoubleMicroseconds(times[i]), 1));
      curve.points.emplace_back(kContexts[i], absl::ToDoubleMicroseconds(times[i]));
    }
    row.push_back(Fixed(
        static_cast<double>(bytes) * kContextMax / absl::ToDoubleNanoseconds(times.back()), 1));
    table.rows.push_back(std::move(row));
    plot.curves.push_back(std::move(curve));
  }
  absl::Status added = bench.report().Add(table);
  added.Update(bench.report().Add(plot));
  bench.report().Say(absl::StrCat("The absorbed form of MLA differs by ", difference,
                                  " of the greatest number from expanded heads, in float32."));
  return added;
}

}  // namespace larder::worker::bench
