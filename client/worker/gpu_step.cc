#include "client/worker/gpu_step.h"

#include <algorithm>
#include <utility>

#include "client/worker/forward_pass.h"
#include "kernels/rope.h"

namespace larder::worker {
namespace {

constexpr size_t kAlign = 256;  // bytes; more than any array here needs

// Arrays laid out one behind the other.
class Layout {
 public:
  template <typename T>
  size_t Add(const std::vector<T>& array) {
    const size_t at = bytes_;
    bytes_ += (array.size() * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

}  // namespace

GpuStep::GpuStep(Gpu& gpu, GpuStepOptions options)
    : gpu_(gpu), options_(std::move(options)), pool_(1), cpu_{.pool = pool_} {}

absl::Status GpuStep::Prepare(std::span<const Chunk> chunks) {
  Describe(chunks);
  Plan();
  return Upload();
}

void GpuStep::Describe(std::span<const Chunk> chunks) {
  tokens_.clear();
  positions_.clear();
  wanted_.clear();
  chunks_.clear();
  table_begins_.clear();
  table_.clear();
  row_begins_.assign(1, 0);
  for (const Chunk& chunk : chunks) {
    for (size_t i = 0; i < chunk.tokens.size(); ++i) {
      if (WantsLogits(chunk, i)) wanted_.push_back(static_cast<int32_t>(tokens_.size()));
      tokens_.push_back(static_cast<int32_t>(chunk.tokens[i]));
      positions_.push_back(static_cast<int32_t>(chunk.position + i));
    }
    row_begins_.push_back(static_cast<int32_t>(tokens_.size()));
    chunks_.push_back({.blocks = nullptr,
                       .position = static_cast<int32_t>(chunk.position),
                       .tokens = static_cast<int32_t>(chunk.tokens.size())});
    table_begins_.push_back(table_.size());
    table_.insert(table_.end(), chunk.blocks.begin(), chunk.blocks.end());
  }
  angles_.resize(tokens_.size() * options_.head_dim);
  kernels::RopeAngles(cpu_, options_.frequencies, positions_, angles_.data());
}

// One token is Decode's, more are Prefill's.
void GpuStep::Plan() {
  std::vector<kernels::cuda::DecodeRow> rows;
  std::vector<kernels::SequenceChunk> longer = chunks_;
  for (size_t i = 0; i < chunks_.size(); ++i) {
    if (chunks_[i].tokens != 1) continue;
    rows.push_back(
        {.chunk = static_cast<int32_t>(i), .row = row_begins_[i], .position = chunks_[i].position});
    longer[i].tokens = 0;
  }
  PlanDecode(rows);
  prefill_plan_ = kernels::cuda::PlanPrefill(longer, {.kv_heads = options_.kv_heads,
                                                      .group = options_.q_heads / options_.kv_heads,
                                                      .head_dim = options_.head_dim,
                                                      .sms = options_.multiprocessors,
                                                      .quantised = options_.quantised});
  // The plan counted the rows of longer chunks only.
  for (kernels::cuda::PrefillTile& tile : prefill_plan_.tiles) tile.row = row_begins_[tile.chunk];
}

// Whole waves of pieces, the last filled up with nobody's, which go where the GPU has nothing else
// to do; and as many groups as there could be.
void GpuStep::PlanDecode(const std::vector<kernels::cuda::DecodeRow>& rows) {
  decode_plan_ = {};
  if (rows.empty()) return;
  decode_plan_ = kernels::cuda::PlanDecode(rows, {.kv_heads = options_.kv_heads,
                                                  .window = options_.window,
                                                  .sinks = options_.sinks,
                                                  .blocks_at_once = options_.decode_blocks});
  const auto wave = static_cast<size_t>(options_.decode_blocks);
  const size_t waves = (decode_plan_.pieces.size() + wave - 1) / wave;
  decode_plan_.pieces.resize(waves * wave, {.row = -1});
  decode_plan_.groups.resize(rows.size() * static_cast<size_t>(options_.kv_heads));
  decode_plan_.slots = static_cast<int32_t>(waves * wave);
}

absl::Status GpuStep::Upload() {
  Layout layout;
  const size_t tokens = layout.Add(tokens_);
  const size_t angles = layout.Add(angles_);
  const size_t row_begins = layout.Add(row_begins_);
  const size_t chunks = layout.Add(chunks_);
  const size_t wanted = layout.Add(wanted_);
  const size_t groups = layout.Add(decode_plan_.groups);
  const size_t pieces = layout.Add(decode_plan_.pieces);
  const size_t tiles = layout.Add(prefill_plan_.tiles);
  const size_t table = layout.Add(table_);
  absl::Status grown = pinned_.Grow(layout.bytes(), GpuBuffer::Pinned);
  if (grown.ok()) grown = device_.Grow(layout.bytes(), GpuBuffer::Device);
  if (!grown.ok()) return grown;

  auto* const device = device_.As<std::byte>();
  for (size_t i = 0; i < chunks_.size(); ++i) {
    chunks_[i].blocks = reinterpret_cast<std::byte* const*>(device + table) + table_begins_[i];
  }
  const auto put = [&]<typename T>(size_t at, const std::vector<T>& array) {
    std::copy(array.begin(), array.end(), reinterpret_cast<T*>(pinned_.As<std::byte>() + at));
    return reinterpret_cast<const T*>(device + at);
  };
  put(table, table_);
  arguments_ = {.tokens = put(tokens, tokens_),
                .angles = put(angles, angles_),
                .wanted_rows = put(wanted, wanted_),
                .wanted = static_cast<int32_t>(wanted_.size()),
                .batch = {.chunks = put(chunks, chunks_),
                          .row_begins = put(row_begins, row_begins_),
                          .chunk_count = static_cast<int32_t>(chunks_.size()),
                          .rows = row_begins_.back()},
                .decode = {.pieces = put(pieces, decode_plan_.pieces),
                           .groups = put(groups, decode_plan_.groups),
                           .piece_count = static_cast<int32_t>(decode_plan_.pieces.size()),
                           .group_count = static_cast<int32_t>(decode_plan_.groups.size()),
                           .slots = decode_plan_.slots},
                .prefill = {.tiles = put(tiles, prefill_plan_.tiles),
                            .tile_count = static_cast<int32_t>(prefill_plan_.tiles.size()),
                            .tile_rows = prefill_plan_.tile_rows}};
  gpu_.Check(cudaMemcpyAsync(device, pinned_.As<std::byte>(), layout.bytes(),
                             cudaMemcpyHostToDevice, gpu_.stream()),
             "bringing a step's tables");
  return absl::OkStatus();
}

}  // namespace larder::worker
