// Append and CopyBlocks on a GPU against the formulas of kernels/*.h: what is stored must agree bit
// by bit, and nothing else may change.
#include <algorithm>
#include <memory>
#include <numeric>

#include "kernels/cuda/blocks.h"
#include "tests/gpu/check.h"
#include "tests/kernels/reference.h"

namespace larder::gpu_tests {
namespace {

using kernels::BytesOf;
using kernels::DType;
using kernels::KvLayer;
using kernels::SequenceChunk;
using kernels::testing::Encode;
using kernels::testing::RowCode;
using kernels::testing::RowScale;

// Prints as a literal.
struct Shape {
  DType input = DType::kBf16;
  DType stored = DType::kBf16;
  int32_t kv_heads = 1;
  int32_t q_heads = 1;
  int32_t dim = 64;      // of a head; of a latent vector
  int32_t rope_dim = 0;  // rotated numbers; 0: rows stay as they are
  bool latent = false;   // the rotated numbers follow `dim` others
  int32_t block_tokens = 16;
  int32_t padding = 0;  // numbers between rows
  float spread = 1;
  std::vector<std::pair<int32_t, int32_t>> chunks = {};  // position, tokens

  std::string Literal() const {
    std::string text = "{DType{" + std::to_string(static_cast<int>(input)) + "}, DType{" +
                       std::to_string(static_cast<int>(stored)) + "}";
    for (const int32_t x :
         {kv_heads, q_heads, dim, rope_dim, int32_t{latent}, block_tokens, padding}) {
      text += ", " + std::to_string(x);
    }
    text += ", " + std::to_string(spread) + ", {";
    for (const auto& [position, tokens] : chunks) {
      text += "{" + std::to_string(position) + ", " + std::to_string(tokens) + "}, ";
    }
    return text + "}}";
  }
};

Shape RandomShape(std::mt19937& random) {
  Shape s;
  s.input = Pick(random, {DType::kF32, DType::kF16, DType::kBf16});
  s.stored = Pick(random, {DType::kF32, DType::kF16, DType::kBf16, DType::kF8E4M3, DType::kI8});
  s.kv_heads = Pick(random, {1, 2, 8, 3});
  s.q_heads = Pick(random, {0, 1, 4});
  s.dim = Pick(random, {8, 64, 80, 128, 192, 256});
  s.rope_dim = Pick(random, {0, 8, s.dim / 8 * 8, 64});
  s.latent = random() % 4 == 0;
  if (s.latent) {
    s.dim = Pick(random, {512, 64, 12});
    s.rope_dim = Pick(random, {64, 16});
    s.kv_heads = 1;
  }
  if (!s.latent) s.rope_dim = std::min(s.rope_dim, s.dim);
  s.block_tokens = Pick(random, {16, 16, 1, 5, 64});
  s.padding = Pick(random, {0, 4, 12});
  s.spread = Pick(random, {1e-3f, 1.0f, 100.0f});
  const int chunks = static_cast<int>(1 + random() % 3);
  for (int i = 0; i < chunks; ++i) {
    s.chunks.emplace_back(Pick(random, {0, 1, 15, 16, 40}), Pick(random, {0, 1, 1, 7, 33}));
  }
  return s;
}

// Rows of numbers of a storage type, on both sides.
struct Rows {
  Rows(std::mt19937& random, DType type, int32_t rows, int64_t stride, float spread)
      : type(type), stride(stride), bytes(rows * stride * BytesOf(type)) {
    std::normal_distribution<float> normal(0, spread);
    for (int64_t i = 0; i < rows * stride; ++i)
      Encode(type, normal(random), &bytes[i * BytesOf(type)]);
    device = std::make_unique<DeviceArray<std::byte>>(bytes);
  }
  std::vector<float> Head(int64_t row, int64_t begin, int32_t count) const {
    std::vector<float> numbers(count);
    for (int32_t i = 0; i < count; ++i) {
      numbers[i] = static_cast<float>(
          kernels::testing::Decoded(type, &bytes[(row * stride + begin + i) * BytesOf(type)]));
    }
    return numbers;
  }

  DType type;
  int64_t stride;
  std::vector<std::byte> bytes;
  std::unique_ptr<DeviceArray<std::byte>> device;
};

// One launch of Append, and what memory should look like after it.
class AppendRun {
 public:
  AppendRun(const Shape& s, uint32_t seed) : shape_(s), random_(seed) {
    if (s.latent) {
      const kernels::LatentGeometry g{s.stored, 2, s.dim, s.rope_dim, s.block_tokens};
      layer_ = LayerOf(g, 1);
      block_bytes_ = BlockBytes(g);
    } else {
      const kernels::HeadGeometry g{s.stored, 2, s.kv_heads, s.dim, s.block_tokens};
      layer_ = LayerOf(g, 1);
      block_bytes_ = BlockBytes(g);
    }
    for (const auto& [position, tokens] : s.chunks) {
      row_begins_.push_back(row_begins_.back() + tokens);
      table_begins_.push_back(blocks_);
      blocks_ += (position + tokens + s.block_tokens - 1) / s.block_tokens;
    }
    block_stride_ = (block_bytes_ + 31) / 16 * 16;
    slots_.resize(blocks_);
    std::iota(slots_.begin(), slots_.end(), 0);
    std::shuffle(slots_.begin(), slots_.end(), random_);
    expected_.assign(blocks_ * block_stride_, std::byte{0xff});
    MakeAngles();
  }

  void Run() {
    const int32_t rows = row_begins_.back();
    Rows k = MakeRows(layer_.kv_heads * layer_.key_dim);
    Rows v = MakeRows(layer_.kv_heads * layer_.value_dim);
    Rows q = MakeRows(shape_.q_heads * layer_.key_dim);
    DeviceArray<std::byte> arena(expected_.size());
    std::vector<std::byte*> tables;
    for (const int32_t slot : slots_) tables.push_back(arena.data() + slot * block_stride_);
    DeviceArray<std::byte*> device_tables(tables);
    std::vector<SequenceChunk> chunks;
    for (size_t i = 0; i < shape_.chunks.size(); ++i) {
      chunks.push_back({device_tables.data() + table_begins_[i], shape_.chunks[i].first,
                        shape_.chunks[i].second});
    }
    const DeviceArray<SequenceChunk> device_chunks(chunks);
    const DeviceArray<int32_t> device_begins(row_begins_);
    const DeviceArray<float> device_angles(cos_sin_);
    kernels::cuda::AppendParams params{.layer = layer_,
                                       .batch = {device_chunks.data(), device_begins.data(),
                                                 static_cast<int32_t>(chunks.size()), rows},
                                       .type = shape_.input,
                                       .k = k.device->data(),
                                       .k_stride = k.stride,
                                       .v = shape_.latent ? nullptr : v.device->data(),
                                       .v_stride = v.stride,
                                       .rotation = {},
                                       .q = q.device->data(),
                                       .q_stride = q.stride,
                                       .q_heads = shape_.q_heads};
    if (shape_.rope_dim != 0)
      params.rotation = {device_angles.data(), RotationBegin(), shape_.rope_dim};
    Require(kernels::cuda::Append(params, nullptr), "Append");
    Expect(arena.Host() == Expected(k, v), "blocks: " + shape_.Literal());
    RotateQueries(q);
    Expect(q.device->Host() == q.bytes, "queries: " + shape_.Literal());
    Expect(k.device->Host() == k.bytes && v.device->Host() == v.bytes,
           "inputs: " + shape_.Literal());
  }

 private:
  int32_t RotationBegin() const {
    return shape_.latent ? shape_.dim : (layer_.key_dim - shape_.rope_dim) / 4 * 4;
  }
  Rows MakeRows(int64_t numbers) {
    return Rows(random_, shape_.input, row_begins_.back(), (numbers + shape_.padding + 3) / 4 * 4,
                shape_.spread);
  }

  void MakeAngles() {
    frequencies_ =
        kernels::testing::Frequencies({.dim = shape_.rope_dim, .theta = 100, .llama3 = {}});
    for (const auto& [position, tokens] : shape_.chunks) {
      for (int32_t i = 0; i < tokens; ++i) {
        for (const double f : frequencies_) cos_sin_.push_back(std::cos((position + i) * f));
        for (const double f : frequencies_) cos_sin_.push_back(std::sin((position + i) * f));
      }
    }
  }

  // In float32, rounded as blocks.cu's comments say; close to the formula in double precision.
  std::vector<float> Rotated(const std::vector<float>& x, int32_t row, int32_t position) const {
    if (shape_.rope_dim == 0) return x;
    const int32_t begin = RotationBegin();
    const int32_t half = shape_.rope_dim / 2;
    std::vector<float> y = x;
    std::vector<double> exact(x.begin(), x.end());
    kernels::testing::Rotate(exact, begin, shape_.rope_dim, position, frequencies_);
    for (int32_t i = 0; i < half; ++i) {
      const float c = cos_sin_[int64_t{row} * shape_.rope_dim + i];
      const float s = cos_sin_[int64_t{row} * shape_.rope_dim + half + i];
      y[begin + i] = std::fmaf(x[begin + half + i], -s, x[begin + i] * c);
      y[begin + half + i] = std::fmaf(x[begin + i], s, x[begin + half + i] * c);
    }
    for (size_t i = 0; i < x.size(); ++i) {
      ExpectWithin(Distance(exact[i], y[i]), 1e-6 * (shape_.spread + std::abs(exact[i])),
                   "rotation");
    }
    return y;
  }

  void Store(const std::vector<float>& numbers, std::byte* block, int64_t at, int64_t scale_at) {
    const double scale = RowScale(shape_.stored, numbers);
    for (size_t i = 0; i < numbers.size(); ++i) {
      Encode(shape_.stored, RowCode(shape_.stored, numbers[i], scale),
             block + at + i * BytesOf(shape_.stored));
    }
    if (!IsQuantised(shape_.stored)) return;
    const auto stored = static_cast<float>(scale);
    std::memcpy(block + scale_at, &stored, sizeof(stored));
  }

  std::vector<std::byte> Expected(const Rows& k, const Rows& v) {
    ForTokens([&](int32_t row, int32_t position, int32_t block_index) {
      std::byte* const block = &expected_[slots_[block_index] * block_stride_];
      const int32_t slot = position % layer_.block_tokens;
      for (int32_t head = 0; head < layer_.kv_heads; ++head) {
        const int64_t at = head * layer_.head_stride_bytes + slot * layer_.token_stride_bytes;
        const int64_t scale_at =
            head * layer_.head_scale_stride_bytes + slot * kernels::kScaleBytes;
        Store(Rotated(k.Head(row, head * layer_.key_dim, layer_.key_dim), row, position), block,
              layer_.key_offset_bytes + at, layer_.key_scale_offset_bytes + scale_at);
        if (layer_.latent) continue;
        Store(v.Head(row, head * layer_.value_dim, layer_.value_dim), block,
              layer_.value_offset_bytes + at, layer_.value_scale_offset_bytes + scale_at);
      }
    });
    return expected_;
  }

  void RotateQueries(Rows& q) {
    ForTokens([&](int32_t row, int32_t position, int32_t) {
      for (int32_t head = 0; head < shape_.q_heads && shape_.rope_dim != 0; ++head) {
        const int64_t begin = int64_t{head} * layer_.key_dim;
        const std::vector<float> y = Rotated(q.Head(row, begin, layer_.key_dim), row, position);
        for (int32_t i = 0; i < layer_.key_dim; ++i) {
          Encode(q.type, y[i], &q.bytes[(row * q.stride + begin + i) * BytesOf(q.type)]);
        }
      }
    });
  }

  // do_token(row, position, index of its block among all tables' blocks)
  template <typename Do>
  void ForTokens(Do&& do_token) {
    for (size_t i = 0; i < shape_.chunks.size(); ++i) {
      const auto [position, tokens] = shape_.chunks[i];
      for (int32_t t = 0; t < tokens; ++t) {
        do_token(row_begins_[i] + t, position + t,
                 table_begins_[i] + (position + t) / layer_.block_tokens);
      }
    }
  }

  const Shape shape_;
  std::mt19937 random_;
  KvLayer layer_;
  int64_t block_bytes_ = 0;
  int64_t block_stride_ = 0;
  int32_t blocks_ = 0;
  std::vector<int32_t> row_begins_ = {0};
  std::vector<int32_t> table_begins_;
  std::vector<int32_t> slots_;  // where in the arena a block lies
  std::vector<std::byte> expected_;
  std::vector<double> frequencies_;
  std::vector<float> cos_sin_;
};

void AppendsRandomShapes(uint32_t seed) {
  std::mt19937 random(seed);
  AppendRun(RandomShape(random), seed).Run();
}

void AppendsTheShapesOfModels(uint32_t seed) {
  for (const DType stored : {DType::kBf16, DType::kF8E4M3, DType::kI8}) {
    AppendRun({.stored = stored,
               .kv_heads = 8,
               .q_heads = 32,
               .dim = 128,
               .rope_dim = 128,
               .chunks = {{31, 1}, {0, 20}}},
              seed)
        .Run();
    AppendRun({.stored = stored,
               .q_heads = 16,
               .dim = 512,
               .rope_dim = 64,
               .latent = true,
               .chunks = {{31, 1}, {0, 20}}},
              seed)
        .Run();
  }
}

// So many rows that a warp has several heads, some warps fewer than others.
void AppendsManyRows(uint32_t seed) {
  for (const DType stored : {DType::kBf16, DType::kF8E4M3}) {
    for (const auto& [kv_heads, q_heads] : {std::pair{8, 32}, {3, 5}, {1, 0}}) {
      AppendRun({.stored = stored,
                 .kv_heads = kv_heads,
                 .q_heads = q_heads,
                 .dim = 16,
                 .rope_dim = 16,
                 .chunks = {{0, 300}, {13, 301}}},
                seed)
          .Run();
    }
  }
}

// Rows that have no usable scale, each kind at each end of a row.
void RowsWithoutAScale(uint32_t) {
  constexpr int32_t kDim = 128;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> k;
  for (const float odd : {0.0f, 1e-39f, nan, infinity, -infinity, 3e38f}) {
    for (const int at : {0, kDim - 1}) {
      std::vector<float> row(kDim, odd == 0 || odd == 1e-39f ? 0.0f : 1.0f);
      row[at] = odd;
      k.insert(k.end(), row.begin(), row.end());
    }
  }
  k.insert(k.end(), kDim, 3e38f);  // whose sum is infinite
  const auto tokens = static_cast<int32_t>(k.size() / kDim);
  for (const DType stored : {DType::kF8E4M3, DType::kI8}) {
    const kernels::LatentGeometry g{stored, 1, kDim, 0, tokens};
    DeviceArray<std::byte> block(BlockBytes(g));
    const DeviceArray<std::byte*> table(std::vector<std::byte*>{block.data()});
    const DeviceArray<SequenceChunk> chunk(std::vector<SequenceChunk>{{table.data(), 0, tokens}});
    const DeviceArray<int32_t> begins(std::vector<int32_t>{0, tokens});
    const DeviceArray<float> rows(k);
    Require(kernels::cuda::Append({.layer = LayerOf(g, 0),
                                   .batch = {chunk.data(), begins.data(), 1, tokens},
                                   .type = DType::kF32,
                                   .k = rows.data(),
                                   .k_stride = kDim,
                                   .rotation = {}},
                                  nullptr),
            "Append");
    const std::vector<std::byte> got = block.Host();
    for (int32_t token = 0; token < tokens; ++token) {
      const std::vector<float> row(&k[token * kDim], &k[token * kDim] + kDim);
      const double scale = RowScale(stored, row);
      float got_scale;
      std::memcpy(&got_scale, &got[NumberBytes(g) + token * kernels::kScaleBytes],
                  sizeof(got_scale));
      Expect(Distance(scale, got_scale) == 0, "scale of row " + std::to_string(token));
      for (int32_t i = 0; i < kDim; ++i) {
        std::byte code;
        Encode(stored, RowCode(stored, row[i], scale), &code);
        if (got[token * kDim + i] != code)
          Fail("code " + std::to_string(i) + " of row " + std::to_string(token));
      }
    }
  }
}

void CopiesBlocks(uint32_t seed) {
  std::mt19937 random(seed);
  for (const int64_t bytes : {16, 4096, 16 * 1024 + 16, 3 * 16 * 1024}) {
    const int64_t stride = bytes + 16;
    constexpr int kBlocks = 9;
    std::vector<std::byte> host(kBlocks * stride);
    for (std::byte& b : host) b = static_cast<std::byte>(random());
    DeviceArray<std::byte> memory(host);
    // From the first five to some of the others.
    std::vector<int> targets = {5, 6, 7, 8};
    std::shuffle(targets.begin(), targets.end(), random);
    targets.resize(1 + random() % targets.size());
    std::vector<kernels::BlockCopy> copies;
    for (const int target : targets) {
      const int source = static_cast<int>(random() % 5);
      copies.push_back({memory.data() + target * stride, memory.data() + source * stride});
      std::copy_n(host.begin() + source * stride, bytes, host.begin() + target * stride);
    }
    const DeviceArray<kernels::BlockCopy> device(copies);
    Require(kernels::cuda::CopyBlocks({device.data(), static_cast<int32_t>(copies.size()), bytes},
                                      nullptr),
            "CopyBlocks");
    Expect(memory.Host() == host, "blocks of " + std::to_string(bytes) + " bytes");
  }
}

void RefusesWhatItCannotDo(uint32_t) {
  kernels::cuda::AppendParams params{
      .layer = LayerOf(kernels::HeadGeometry{DType::kBf16, 1, 1, 64, 16}, 0),
      .batch = {},
      .rotation = {}};
  Expect(kernels::cuda::Append(params, nullptr) == cudaSuccess, "an empty batch");
  params.type = DType::kI8;
  Expect(kernels::cuda::Append(params, nullptr) == cudaErrorInvalidValue, "codes as input");
  params.type = DType::kBf16;
  params.k_stride = 66;
  Expect(kernels::cuda::Append(params, nullptr) == cudaErrorInvalidValue, "a stride of 66");
  params.k_stride = 64;
  const auto refused = [](const char* what, DType type, auto change) {
    kernels::cuda::AppendParams p{.layer = LayerOf(kernels::HeadGeometry{type, 1, 2, 64, 16}, 0),
                                  .batch = {},
                                  .rotation = {}};
    Expect(kernels::cuda::Append(p, nullptr) == cudaSuccess, "the layer as it is");
    change(p.layer);
    Expect(kernels::cuda::Append(p, nullptr) == cudaErrorInvalidValue, what);
  };
  refused("blocks of no tokens", DType::kBf16, [](KvLayer& layer) { layer.block_tokens = 0; });
  refused("no kv heads", DType::kBf16, [](KvLayer& layer) { layer.kv_heads = 0; });
  refused("rows aligned to 4 bytes", DType::kBf16, [](KvLayer& l) { l.token_stride_bytes += 4; });
  refused("keys' scales aligned to 2", DType::kI8,
          [](KvLayer& l) { l.key_scale_offset_bytes += 2; });
  refused("values' scales aligned to 2", DType::kI8,
          [](KvLayer& layer) { layer.value_scale_offset_bytes += 2; });
  refused("heads' scales aligned to 2", DType::kI8,
          [](KvLayer& layer) { layer.head_scale_stride_bytes += 2; });
  params.layer.key_dim = kernels::cuda::kAppendDimMax + 4;
  Expect(kernels::cuda::Append(params, nullptr) == cudaErrorInvalidValue, "too large a head");
  Expect(kernels::cuda::CopyBlocks({nullptr, 0, 24}, nullptr) == cudaErrorInvalidValue, "24 bytes");
  Expect(kernels::cuda::CopyBlocks({nullptr, 0, 32}, nullptr) == cudaSuccess, "no copies");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(argc, argv,
                  std::vector<Case>{{"appends_random_shapes", 60, AppendsRandomShapes},
                                    {"appends_the_shapes_of_models", 1, AppendsTheShapesOfModels},
                                    {"appends_many_rows", 1, AppendsManyRows},
                                    {"rows_without_a_scale", 1, RowsWithoutAScale},
                                    {"copies_blocks", 10, CopiesBlocks},
                                    {"refuses_what_it_cannot_do", 1, RefusesWhatItCannotDo}});
}
