// The CUDA kernels' figures: rows for tests/bench/table.py, one line of JSON each.
//
//   gpu_bench [PEERS [FIGURE...]]
//
// Each figure by itself: one that fails prints a line of its own to stderr, and the exit status
// is 1. A figure's name is that of its rows without gpu_; "list" prints all.
//
// Workload: one layer of Llama-3-8B, 32 query heads and 8 kv heads of 128, bf16, in blocks of 16
// tokens and 32 layers (2 MiB) that lie in random order in one arena: as in service, a layer's
// kernel touches a little of every block. 8 sequences of 32k tokens are 34 GB so; a GPU with less
// gets blocks of fewer layers. Numbers are normal, so that tensor cores use as much power as in
// service. Medians of event times; before each run 256 MiB are read, so level 2 holds none of what
// is read, and nothing that it would have to write back. Kernels that move bytes are held against a
// kernel that only reads, Prefill against the tensor cores' published rate and against PyTorch,
// whose times are lines "name microseconds" in the file PEERS.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <set>

#include "kernels/cuda/blocks.h"
#include "kernels/cuda/decode.h"
#include "kernels/cuda/ops.h"
#include "kernels/cuda/prefill.h"
#include "tests/gpu/bench_device.h"

namespace larder::gpu_tests {
namespace {

using kernels::DType;
using kernels::HeadGeometry;
using kernels::KvLayer;
using kernels::SequenceChunk;

constexpr int32_t kQHeads = 32;
constexpr int32_t kKvHeads = 8;
constexpr int32_t kHeadDim = 128;
constexpr int32_t kBlockTokens = 16;
constexpr int32_t kLayersMax = 32;

// ---- Rows.

struct Row {
  std::string name;
  double value;
  const char* unit;
  std::string against;
  double ratio;
  double at_least = 0;  // goal for the ratio; 0: report
};

// A number for JSON, which has no infinity.
std::string Number(const char* format, double x) {
  char text[32] = "null";
  if (std::isfinite(x)) std::snprintf(text, sizeof(text), format, x);
  return text;
}

void Print(const Row& row) {
  char goal[32] = "report";
  if (row.at_least > 0) std::snprintf(goal, sizeof(goal), ">= %.2f", row.at_least);
  const char* const met = row.at_least == 0 ? "null" : row.ratio >= row.at_least ? "true" : "false";
  std::printf(
      "{\"name\": \"%s\", \"value\": %s, \"unit\": \"%s\", \"against\": \"%s\", "
      "\"ratio\": %s, \"goal\": \"%s\", \"met\": %s}\n",
      row.name.c_str(), Number("%.6g", row.value).c_str(), row.unit, row.against.c_str(),
      Number("%.4g", row.ratio).c_str(), goal, met);
  std::fflush(stdout);
}

std::string Text(const char* format, double x) {
  char text[96];
  std::snprintf(text, sizeof(text), format, x);
  return text;
}

struct Machine {
  Clock clock;
  cudaDeviceProp device = {};
  double read_bytes_us = 0;  // of a kernel that only reads
  std::map<std::string, double> peers_us;

  // A kernel's row: its share of the bandwidth that reading alone reaches.
  void PrintBytes(const std::string& name, double us, double bytes, double at_least = 0) const {
    Print({name, us, "us", Text("reading as many bytes: %.1f us", bytes / read_bytes_us),
           bytes / read_bytes_us / us, at_least});
  }
  void PrintPeer(const std::string& name, double us) const {
    const auto peer = peers_us.find(name);
    if (peer == peers_us.end()) return;
    Print({"gpu_" + name + "_over_torch", us, "us",
           Text("PyTorch's attention: %.1f us", peer->second), peer->second / us, 1});
  }
};

// What the other figures are held against.
void MeasureReading(Machine& m) {
  constexpr int64_t kBytes = int64_t{1} << 30;
  const DeviceArray<std::byte> from(kBytes);
  DeviceArray<uint4> sink(1);
  m.read_bytes_us = kBytes / m.clock.Microseconds([&](cudaStream_t stream) {
    return Read(from.data(), kBytes, sink.data(), stream);
  });
}

void PrintReading(Machine& m) {
  int clock_khz = 0;
  int bus_bits = 0;
  cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, 0);
  cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, 0);
  const double peak = 2e-6 * clock_khz * bus_bits / 8;  // GB/s; 0: the driver does not say
  Print({"gpu_read", m.read_bytes_us / 1000, "GB/s", Text("the memory's own rate: %.0f GB/s", peak),
         m.read_bytes_us / 1000 / peak});
}

// Sequences of equal length in blocks of all layers, in random order.
class Kv {
 public:
  Kv(DType dtype, int32_t sequences, int32_t tokens) {
    HeadGeometry geometry{dtype, kLayersMax, kKvHeads, kHeadDim, kBlockTokens};
    const int64_t blocks = int64_t{sequences} * ((tokens + kBlockTokens - 1) / kBlockTokens);
    size_t free_bytes = 0;
    size_t all_bytes = 0;
    Require(cudaMemGetInfo(&free_bytes, &all_bytes), "cudaMemGetInfo");
    while (geometry.layers > 1 &&
           blocks * BlockBytes(geometry) > static_cast<int64_t>(free_bytes) / 4 * 3) {
      geometry.layers /= 2;
    }
    layer = LayerOf(geometry, geometry.layers / 2);
    const int64_t stride = (BlockBytes(geometry) + 4095) / 4096 * 4096;
    arena_ = std::make_unique<DeviceArray<std::byte>>(blocks * stride);
    Fill(dtype, arena_->data(), blocks * stride);
    // As bytes of a float32 0x3c is 0.0115: what codes' scales are.
    Require(cudaMemset2D(arena_->data() + NumberBytes(geometry), stride, 0x3c, ScaleBytes(geometry),
                         blocks),
            "cudaMemset2D");
    std::vector<int64_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(1));
    std::vector<std::byte*> table;
    for (const int64_t i : order) table.push_back(arena_->data() + i * stride);
    table_ = std::make_unique<DeviceArray<std::byte*>>(table);
    for (int32_t s = 0; s < sequences; ++s) {
      chunks.push_back({table_->data() + blocks / sequences * s, 0, 0});
    }
    layer_bytes =
        2.0 * sequences * tokens * kKvHeads *
        (kHeadDim * kernels::BytesOf(dtype) + (IsQuantised(dtype) ? kernels::kScaleBytes : 0));
  }

  KvLayer layer;
  std::vector<SequenceChunk> chunks;  // host; `blocks` device pointers
  double layer_bytes = 0;

 private:
  std::unique_ptr<DeviceArray<std::byte>> arena_;
  std::unique_ptr<DeviceArray<std::byte*>> table_;
};

// ---- Figures.

void MeasureDecode(Machine& m, const std::string& name, DType stored, int32_t sequences,
                   int32_t tokens, double at_least) {
  using namespace kernels::cuda;  // NOLINT: names of what is measured
  Kv kv(stored, sequences, tokens);
  std::vector<DecodeRow> rows;
  for (int32_t s = 0; s < sequences; ++s) {
    kv.chunks[s].position = tokens - 1;
    kv.chunks[s].tokens = 1;
    rows.push_back({s, s, tokens - 1});
  }
  int32_t blocks_at_once = 0;
  Require(DecodeBlocksAtOnce(kv.layer, kQHeads, &blocks_at_once), "DecodeBlocksAtOnce");
  const DecodePlan plan =
      PlanDecode(rows, {.kv_heads = kKvHeads, .blocks_at_once = blocks_at_once});
  const DeviceArray<DecodePiece> pieces(plan.pieces);
  const DeviceArray<DecodeGroup> groups(plan.groups);
  const DeviceArray<SequenceChunk> chunks(kv.chunks);
  const auto q = Normal(DecodeQueryType(kv.layer), int64_t{sequences} * kQHeads * kHeadDim);
  DeviceArray<uint16_t> out(q->size());
  DecodeParams p{.layer = kv.layer, .q_heads = kQHeads, .scale = 0.088f, .plan = {}};
  p.q = q->data();
  p.out = out.data();
  p.q_stride = p.out_stride = kQHeads * kHeadDim;
  p.out_dtype = DecodeQueryType(kv.layer);
  p.chunks = chunks.data();
  p.plan = {pieces.data(), groups.data(), static_cast<int32_t>(plan.pieces.size()),
            static_cast<int32_t>(plan.groups.size()), plan.slots};
  DeviceArray<std::byte> workspace(DecodeWorkspaceBytes(p));
  Require(cudaMemset(workspace.data(), 0, workspace.size()), "cudaMemset");
  p.workspace = workspace.data();
  const double us = m.clock.Microseconds([&](cudaStream_t stream) { return Decode(p, stream); });
  m.PrintBytes("gpu_" + name, us, kv.layer_bytes, at_least);
  m.PrintPeer(name, us);
}

void MeasurePrefill(Machine& m, const std::string& name, int32_t cached, int32_t tokens) {
  using namespace kernels::cuda;  // NOLINT: names of what is measured
  Kv kv(DType::kBf16, 1, cached + tokens);
  kv.chunks[0].position = cached;
  kv.chunks[0].tokens = tokens;
  const PrefillPlan plan = PlanPrefill(
      kv.chunks, {kKvHeads, kQHeads / kKvHeads, kHeadDim, m.device.multiProcessorCount});
  const DeviceArray<PrefillTile> tiles(plan.tiles);
  const DeviceArray<SequenceChunk> chunks(kv.chunks);
  const auto q = Normal(DType::kBf16, int64_t{tokens} * kQHeads * kHeadDim);
  DeviceArray<uint16_t> out(q->size());
  PrefillParams p{.layer = kv.layer, .q_heads = kQHeads, .scale = 0.088f, .plan = {}};
  p.q = q->data();
  p.out = out.data();
  p.q_stride = p.out_stride = kQHeads * kHeadDim;
  p.out_dtype = DType::kBf16;
  p.chunks = chunks.data();
  p.plan = {tiles.data(), static_cast<int32_t>(plan.tiles.size()), plan.tile_rows};
  const double us = m.clock.Microseconds([&](cudaStream_t stream) { return Prefill(p, stream); });
  // Two products of 2 flop; a token sees the cached ones and half of the new ones.
  const double tflop = 4e-12 * kQHeads * kHeadDim * tokens * (cached + (tokens + 1) / 2.0);
  Print({"gpu_" + name, us, "us",
         Text("H100's 989 TFLOP/s, published; here %.0f", tflop / us * 1e6),
         tflop / us * 1e6 / 989});
  m.PrintPeer(name, us);
}

void MeasureAppend(Machine& m, const std::string& name, DType stored) {
  constexpr int32_t kTokens = 8192;
  Kv kv(stored, 1, kTokens);
  kv.chunks[0].tokens = kTokens;
  const DeviceArray<SequenceChunk> chunks(kv.chunks);
  const DeviceArray<int32_t> begins(std::vector<int32_t>{0, kTokens});
  const auto k = Normal(DType::kBf16, int64_t{kTokens} * kKvHeads * kHeadDim);
  const auto v = Normal(DType::kBf16, int64_t{kTokens} * kKvHeads * kHeadDim);
  const DeviceArray<float> angles(std::vector<float>(kTokens * kHeadDim, 0.7f));
  const kernels::cuda::AppendParams p{.layer = kv.layer,
                                      .batch = {chunks.data(), begins.data(), 1, kTokens},
                                      .k = k->data(),
                                      .k_stride = kKvHeads * kHeadDim,
                                      .v = v->data(),
                                      .v_stride = kKvHeads * kHeadDim,
                                      .rotation = {angles.data(), 0, kHeadDim}};
  const double us = m.clock.Microseconds([&](cudaStream_t stream) { return Append(p, stream); });
  m.PrintBytes(name, us, 2.0 * k->size() * 2 + kv.layer_bytes);
}

void MeasureCopy(Machine& m) {
  constexpr int64_t kBlockBytes = 2 << 20;
  constexpr int32_t kBlocks = 64;
  DeviceArray<std::byte> memory(2 * kBlocks * kBlockBytes);
  std::vector<kernels::BlockCopy> copies;
  for (int64_t i = 0; i < kBlocks; ++i) {
    copies.push_back({memory.data() + (kBlocks + i * 37 % kBlocks) * kBlockBytes,
                      memory.data() + i * kBlockBytes});
  }
  const DeviceArray<kernels::BlockCopy> device(copies);
  const double us = m.clock.Microseconds([&](cudaStream_t stream) {
    return kernels::cuda::CopyBlocks({device.data(), kBlocks, kBlockBytes}, stream);
  });
  const double one_by_one_us = m.clock.Microseconds([&](cudaStream_t stream) {
    for (const kernels::BlockCopy& copy : copies) {
      Require(cudaMemcpyAsync(copy.to, copy.from, kBlockBytes, cudaMemcpyDeviceToDevice, stream),
              "a copy");
    }
    return cudaSuccess;
  });
  Print({"gpu_copy_64_blocks", us, "us", Text("cudaMemcpyAsync each: %.1f us", one_by_one_us),
         one_by_one_us / us, 1});
}

void MeasureRows(Machine& m) {
  constexpr int32_t kRows = 8192;
  constexpr int32_t kDim = 4096;
  const auto x = Normal(DType::kBf16, int64_t{kRows} * kDim);
  const auto y = Normal(DType::kBf16, int64_t{kRows} * kDim);
  DeviceArray<uint16_t> out(x->size());
  const double norm_us = m.clock.Microseconds([&](cudaStream_t stream) {
    return kernels::cuda::RmsNorm({.x = x->data(),
                                   .x_stride = kDim,
                                   .out = out.data(),
                                   .out_stride = kDim,
                                   .weight = y->data(),
                                   .rows = kRows,
                                   .dim = kDim,
                                   .epsilon = 1e-5f},
                                  stream);
  });
  m.PrintBytes("gpu_rms_norm_8k", norm_us, 2.0 * 2 * kRows * kDim);
  const double silu_us = m.clock.Microseconds([&](cudaStream_t stream) {
    return kernels::cuda::SiluMul({.gate = x->data(),
                                   .up = y->data(),
                                   .in_stride = kDim,
                                   .out = out.data(),
                                   .out_stride = kDim,
                                   .rows = kRows,
                                   .dim = kDim},
                                  stream);
  });
  m.PrintBytes("gpu_silu_mul_8k", silu_us, 3.0 * 2 * kRows * kDim);
}

struct Figure {
  const char* name;
  void (*measure)(Machine&);
};

constexpr Figure kFigures[] = {
    {"read", PrintReading},
    {"decode_1x4k", [](Machine& m) { MeasureDecode(m, "decode_1x4k", DType::kBf16, 1, 4096, 0); }},
    {"decode_8x4k", [](Machine& m) { MeasureDecode(m, "decode_8x4k", DType::kBf16, 8, 4096, 0); }},
    {"decode_32x4k",
     [](Machine& m) { MeasureDecode(m, "decode_32x4k", DType::kBf16, 32, 4096, 0.85); }},
    {"decode_8x16k",
     [](Machine& m) { MeasureDecode(m, "decode_8x16k", DType::kBf16, 8, 16384, 0.85); }},
    {"decode_8x32k",
     [](Machine& m) { MeasureDecode(m, "decode_8x32k", DType::kBf16, 8, 32768, 0.85); }},
    {"decode_8x32k_e4m3",
     [](Machine& m) { MeasureDecode(m, "decode_8x32k_e4m3", DType::kF8E4M3, 8, 32768, 0.75); }},
    {"decode_8x32k_int8",
     [](Machine& m) { MeasureDecode(m, "decode_8x32k_int8", DType::kI8, 8, 32768, 0); }},
    {"prefill_1k_over_7k", [](Machine& m) { MeasurePrefill(m, "prefill_1k_over_7k", 7168, 1024); }},
    {"prefill_8k", [](Machine& m) { MeasurePrefill(m, "prefill_8k", 0, 8192); }},
    {"append_8k", [](Machine& m) { MeasureAppend(m, "gpu_append_8k", DType::kBf16); }},
    {"append_8k_e4m3", [](Machine& m) { MeasureAppend(m, "gpu_append_8k_e4m3", DType::kF8E4M3); }},
    {"copy_64_blocks", MeasureCopy},
    {"rows", MeasureRows}};

void Measure(const Figure& figure, const char* peers) {
  Machine m;
  Require(cudaGetDeviceProperties(&m.device, 0), "cudaGetDeviceProperties");
  std::ifstream file(peers);
  std::string name;
  double us = 0;
  while (file >> name >> us) m.peers_us[name] = us;
  MeasureReading(m);
  figure.measure(m);
}

// A process a figure: a kernel that fails takes its whole process's GPU with it.
bool MeasureApart(const Figure& figure, const char* peers) {
  const pid_t child = fork();
  if (child == 0) {
    Measure(figure, peers);
    std::exit(0);
  }
  int status = 0;
  const bool right = child > 0 && waitpid(child, &status, 0) == child && status == 0;
  if (!right) std::fprintf(stderr, "%s: failed\n", figure.name);
  return right;
}

int Main(int argc, char** argv) {
  const std::set<std::string> wanted(argv + std::min(argc, 2), argv + argc);
  bool right = true;
  for (const Figure& figure : kFigures) {
    if (wanted.contains("list")) {
      std::printf("%s\n", figure.name);
    } else if (wanted.empty() || wanted.contains(figure.name)) {
      right = MeasureApart(figure, argc > 1 ? argv[1] : "") && right;
    }
  }
  return right ? 0 : 1;
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) { return larder::gpu_tests::Main(argc, argv); }
