#include "kernels/attention.h"

#include <algorithm>
#include <cassert>

#include "kernels/variant.h"

namespace larder::kernels {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kPartialBytesMax = int64_t{64} << 20;
// A thread should have this many shares of the work, so that the last to finish is not waited for
// long.
constexpr int64_t kSharesAThread = 8;
// Heads whose rows are few share a tile up to so many rows: their keys are neighbours in memory.
constexpr int32_t kSharedRows = 8;

constexpr int64_t Aligned(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// One chunk's tiles: (kv_heads kv heads, kTileRows rows), kv heads outermost.
struct Shape {
  int64_t rows = 0;  // tokens times group
  int32_t kv_heads = 1;
  int64_t row_tiles = 0;
  int64_t tiles = 0;
  int32_t piece_begin = 0;
  int32_t piece_end = 0;    // of the last row
  int64_t tile_floats = 0;  // partial results of a tile's pieces

  int64_t pieces() const { return piece_end - piece_begin; }
};

int32_t Group(const AttentionParams& params) { return params.q_heads / params.layer.kv_heads; }

// First piece past the last key that is visible at `position`.
int32_t PieceEnd(const AttentionParams& params, int32_t position) {
  const int64_t keys = std::min<int64_t>(int64_t{position} + 1, params.key_end);
  return static_cast<int32_t>((keys + kPieceTokens - 1) / kPieceTokens);
}

Shape ShapeOf(const AttentionParams& params, const SequenceChunk& chunk) {
  Shape shape;
  if (chunk.tokens == 0) return shape;
  shape.rows = int64_t{chunk.tokens} * Group(params);
  shape.row_tiles = (shape.rows + kTileRows - 1) / kTileRows;
  while (params.layer.kv_heads % (2 * shape.kv_heads) == 0 &&
         2 * shape.kv_heads * shape.rows <= kSharedRows) {
    shape.kv_heads *= 2;
  }
  shape.tiles = shape.row_tiles * params.layer.kv_heads / shape.kv_heads;
  shape.piece_begin = params.key_begin / kPieceTokens;
  shape.piece_end =
      std::max(PieceEnd(params, chunk.position + chunk.tokens - 1), shape.piece_begin);
  shape.tile_floats =
      shape.pieces() * PartialFloats(shape.kv_heads * std::min<int64_t>(shape.rows, kTileRows),
                                     params.layer.value_dim);
  return shape;
}

// Where a chunk's rows and shares begin: sums over the chunks before it.
struct Mark {
  int64_t rows = 0;
  int64_t tiles = 0;
  int64_t shares = 0;  // runs of pieces of a tile
  int64_t floats = 0;
};

// How a call is shared out, and where its workspace's parts begin.
struct Plan {
  Mark total;
  int32_t share_pieces = 1;
  bool split = false;  // some tile is more than one share
  int64_t scratch_floats = 0;
  int64_t partials_offset = 0;
  int64_t scratch_offset = 0;
  int64_t bytes = 0;

  int64_t SharesOf(const Shape& shape) const {
    return (shape.pieces() + share_pieces - 1) / share_pieces;
  }
  void Advance(Mark& mark, const Shape& shape, const SequenceChunk& chunk) const {
    mark.rows += chunk.tokens;
    mark.tiles += shape.tiles;
    mark.shares += shape.tiles * SharesOf(shape);
    mark.floats += shape.tiles * shape.tile_floats;
  }
};

// Tiles are split into runs of pieces only where whole ones are too few or too uneven for the
// threads: partial results are 1.6% more traffic for a group of 4 heads of 128.
Plan PlanOf(const Cpu& cpu, const AttentionParams& params) {
  const auto floats = static_cast<int64_t>(sizeof(float));
  const int64_t threads = cpu.pool.threads();
  Plan plan;
  int64_t longest = 0;
  for (const SequenceChunk& chunk : params.chunks) {
    const Shape shape = ShapeOf(params, chunk);
    plan.Advance(plan.total, shape, chunk);
    longest = std::max(longest, shape.pieces());
  }
  const int64_t share = std::max<int64_t>(1, plan.total.shares / (threads * kSharesAThread));
  plan.split = threads > 1 && share < longest && plan.total.floats * floats <= kPartialBytesMax;
  plan.share_pieces = static_cast<int32_t>(plan.split ? share : std::max<int64_t>(longest, 1));
  plan.total.shares = 0;
  for (const SequenceChunk& chunk : params.chunks) {
    const Shape shape = ShapeOf(params, chunk);
    plan.total.shares += shape.tiles * plan.SharesOf(shape);
  }
  plan.scratch_floats = ScratchFloats(params.layer.key_dim, params.layer.value_dim);
  plan.partials_offset = Aligned(static_cast<int64_t>((params.chunks.size() + 1) * sizeof(Mark)));
  plan.scratch_offset = plan.partials_offset + Aligned(plan.split ? plan.total.floats * floats : 0);
  plan.bytes = plan.scratch_offset + threads * Aligned(plan.scratch_floats * floats);
  return plan;
}

// One call of Attend.
class Attention {
 public:
  Attention(const Cpu& cpu, const AttentionParams& params, std::span<std::byte> workspace)
      : cpu_(cpu),
        params_(params),
        variant_(VariantOf(cpu.isa)),
        plan_(PlanOf(cpu, params)),
        marks_(reinterpret_cast<Mark*>(workspace.data()), params.chunks.size() + 1),
        partials_(reinterpret_cast<float*>(workspace.data() + plan_.partials_offset)),
        scratch_(workspace.data() + plan_.scratch_offset) {
    assert(workspace.size() >= static_cast<size_t>(plan_.bytes));
    marks_[0] = Mark{};
    for (size_t i = 0; i < params.chunks.size(); ++i) {
      marks_[i + 1] = marks_[i];
      plan_.Advance(marks_[i + 1], ShapeOf(params, params.chunks[i]), params.chunks[i]);
    }
  }

  void Run() {
    if (!plan_.split) {
      return cpu_.pool.ParallelFor(plan_.total.tiles, [this](int64_t index, int worker) {
        variant_.attend_whole(TileAt(index), ScratchOf(worker));
      });
    }
    cpu_.pool.ParallelFor(plan_.total.shares, [this](int64_t index, int worker) {
      variant_.attend_pieces(ShareAt(index), ScratchOf(worker));
    });
    cpu_.pool.ParallelFor(plan_.total.tiles, [this](int64_t index, int worker) {
      variant_.merge_pieces(TileAt(index), ScratchOf(worker));
    });
  }

 private:
  float* ScratchOf(int worker) const {
    return reinterpret_cast<float*>(
        scratch_ + worker * Aligned(plan_.scratch_floats * static_cast<int64_t>(sizeof(float))));
  }

  // The chunk in which the running count `field` reaches `index`.
  size_t ChunkOf(int64_t Mark::*field, int64_t index) const {
    const auto after =
        std::upper_bound(marks_.begin(), marks_.end(), index,
                         [field](int64_t value, const Mark& mark) { return value < mark.*field; });
    return static_cast<size_t>(after - marks_.begin()) - 1;
  }

  AttendTile TileAt(int64_t index) const {
    const size_t chunk = ChunkOf(&Mark::tiles, index);
    return TileOf(chunk, ShapeOf(params_, params_.chunks[chunk]), index - marks_[chunk].tiles);
  }

  // A run of pieces of a tile.
  AttendTile ShareAt(int64_t index) const {
    const size_t chunk = ChunkOf(&Mark::shares, index);
    const Shape shape = ShapeOf(params_, params_.chunks[chunk]);
    const int64_t shares = plan_.SharesOf(shape);
    const int64_t share = index - marks_[chunk].shares;
    AttendTile tile = TileOf(chunk, shape, share / shares);
    const auto skipped = static_cast<int32_t>(share % shares) * plan_.share_pieces;
    tile.partials +=
        skipped * PartialFloats(int64_t{tile.kv_heads} * (tile.row_end - tile.row_begin),
                                params_.layer.value_dim);
    // A tile's rows may see fewer pieces than the chunk's last row.
    const int32_t end = tile.piece_end;
    tile.piece_begin = std::min(shape.piece_begin + skipped, end);
    tile.piece_end = std::min(tile.piece_begin + plan_.share_pieces, end);
    return tile;
  }

  AttendTile TileOf(size_t index, const Shape& shape, int64_t tile) const {
    const SequenceChunk& chunk = params_.chunks[index];
    const int32_t group = Group(params_);
    const int64_t kv_head = tile / shape.row_tiles * shape.kv_heads;
    const int64_t row_begin = tile % shape.row_tiles * kTileRows;
    const int64_t row_end = std::min(row_begin + kTileRows, shape.rows);
    const int64_t first_row = marks_[index].rows;
    const int64_t head = kv_head * group;
    const int32_t last = chunk.position + static_cast<int32_t>((row_end - 1) / group);
    return {
        .params = &params_,
        .chunk = &chunk,
        .q = params_.q + first_row * params_.q_stride + head * params_.layer.key_dim,
        .out = params_.out + first_row * params_.out_stride + head * params_.layer.value_dim,
        .lse = params_.lse == nullptr ? nullptr : params_.lse + first_row * params_.q_heads + head,
        .kv_head = static_cast<int32_t>(kv_head),
        .kv_heads = shape.kv_heads,
        .group = group,
        .row_begin = static_cast<int32_t>(row_begin),
        .row_end = static_cast<int32_t>(row_end),
        .piece_begin = shape.piece_begin,
        .piece_end = std::max(PieceEnd(params_, last), shape.piece_begin),
        .partials = partials_ + marks_[index].floats + tile * shape.tile_floats};
  }

  const Cpu& cpu_;
  const AttentionParams& params_;
  const Variant& variant_;
  const Plan plan_;
  const std::span<Mark> marks_;  // [chunks + 1]
  float* const partials_;
  std::byte* const scratch_;
};

}  // namespace

size_t AttentionWorkspaceBytes(const Cpu& cpu, const AttentionParams& params) {
  return static_cast<size_t>(PlanOf(cpu, params).bytes);
}

void Attend(const Cpu& cpu, const AttentionParams& params, std::span<std::byte> workspace) {
  Attention(cpu, params, workspace).Run();
}

void MergeAttention(const Cpu& cpu, const MergeParams& params) {
  const Variant& variant = VariantOf(cpu.isa);
  cpu.pool.ParallelFor(params.rows, [&](int64_t row, int) { variant.merge_row(params, row); });
}

}  // namespace larder::kernels
