// Attention on the CPU against the limits of the machine, against PyTorch, and over codes against
// bf16.
//
// Llama-3-8B's shape: 32 q heads, 8 kv heads of 128, bf16, blocks of 16 tokens in random order, 8
// layers of 4,096 cached tokens: 128 MiB, cycled through, so that no cache holds what comes next.
// All threads. A run is one decode step (one token) through all layers, or one prefill chunk of
// 256 tokens in one layer. Sides take turns, and each pair gives a ratio.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "bench.h"
#include "kernels/attention.h"
#include "machine_limits.h"
#include "storage/check.h"
#include "torch_peer.h"

namespace larder::bench {
namespace {

constexpr kernels::HeadGeometry GeometryOf(kernels::DType dtype) {
  return {.dtype = dtype, .layers = 8, .kv_heads = 8, .head_dim = 128, .block_tokens = 16};
}
constexpr int32_t kQueryHeads = 32;
constexpr int32_t kTokens = 4096;
constexpr int32_t kChunk = 256;
constexpr int kPairs = 15;

// The cached tokens, and a query row for each token of a chunk.
class Attender {
 public:
  explicit Attender(kernels::ThreadPool& pool, kernels::DType dtype = kernels::DType::kBf16)
      : cpu_{pool},
        geometry_(GeometryOf(dtype)),
        bytes_(kernels::BlockBytes(geometry_) * kTokens / geometry_.block_tokens) {
    base_ = static_cast<std::byte*>(
        ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    LARDER_CHECK(base_ != MAP_FAILED);
    ::madvise(base_, bytes_, MADV_HUGEPAGE);  // as an arena asks for
    std::mt19937 random(1);
    for (size_t at = 0; at < bytes_; at += sizeof(uint32_t)) {
      // Two bf16 of +-[0.5, 1). As codes and as scales whatever they are: finite numbers.
      const uint32_t word = (static_cast<uint32_t>(random()) & 0x80778077) | 0x3f003f00;
      std::memcpy(base_ + at, &word, sizeof(word));
    }
    blocks_.resize(kTokens / geometry_.block_tokens);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      blocks_[i] = base_ + i * kernels::BlockBytes(geometry_);
    }
    std::shuffle(blocks_.begin(), blocks_.end(), random);
    q_.resize(int64_t{kChunk} * kQueryHeads * geometry_.head_dim);
    for (float& x : q_) x = static_cast<float>(random()) * 0x1p-31f - 1;
    out_.resize(q_.size());
  }
  ~Attender() { ::munmap(base_, bytes_); }
  Attender(const Attender&) = delete;
  Attender& operator=(const Attender&) = delete;

  std::span<const std::byte> memory() const { return {base_, bytes_}; }

  double DecodeSeconds() {
    return Timed([&] {
      for (int32_t layer = 0; layer < geometry_.layers; ++layer) Attend(layer, 1);
    });
  }
  double PrefillSeconds() {
    layer_ = (layer_ + 1) % geometry_.layers;
    return Timed([&] { Attend(layer_, kChunk); });
  }

 private:
  // The last `tokens` of the sequence.
  void Attend(int32_t layer, int32_t tokens) {
    const kernels::SequenceChunk chunk{blocks_.data(), kTokens - tokens, tokens};
    const int64_t stride = int64_t{kQueryHeads} * geometry_.head_dim;
    kernels::AttentionParams params;
    params.layer = kernels::LayerOf(geometry_, layer);
    params.q_heads = kQueryHeads;
    params.scale = 1 / std::sqrt(static_cast<float>(geometry_.head_dim));
    params.q = q_.data();
    params.q_stride = stride;
    params.out = out_.data();
    params.out_stride = stride;
    params.chunks = {&chunk, 1};
    const size_t bytes = kernels::AttentionWorkspaceBytes(cpu_, params);
    if (workspace_.size() < bytes + 64) workspace_.resize(bytes + 64);
    void* aligned = workspace_.data();
    size_t space = workspace_.size();
    std::align(64, bytes, aligned, space);
    kernels::Attend(cpu_, params, {static_cast<std::byte*>(aligned), bytes});
  }

  const kernels::Cpu cpu_;
  const kernels::HeadGeometry geometry_;
  const size_t bytes_;
  std::byte* base_;
  std::vector<std::byte*> blocks_;
  std::vector<float> q_;
  std::vector<float> out_;
  std::vector<std::byte> workspace_;
  int32_t layer_ = 0;
};

// In turn, who goes first changing; the first pair, which finds everything cold, is left out.
template <typename Ours, typename Theirs>
void Pairs(Ours ours, Theirs theirs, std::vector<double>& a, std::vector<double>& b) {
  for (int pair = -1; pair < kPairs; ++pair) {
    double first = pair % 2 == 0 ? ours() : 0;
    const double other = theirs();
    if (first == 0) first = ours();
    if (pair < 0) continue;
    a.push_back(first);
    b.push_back(other);
  }
}

std::vector<double> Ratios(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> ratios(a.size());
  std::transform(a.begin(), a.end(), b.begin(), ratios.begin(), std::divides<>());
  return ratios;
}

absl::Status MeasureReadBandwidth() {
  kernels::ThreadPool pool;
  Attender attender(pool);
  std::vector<double> decode;
  std::vector<double> read;
  Pairs([&] { return attender.DecodeSeconds(); },
        [&] { return ReadSeconds(pool, attender.memory()); }, decode, read);
  const double gigabytes = static_cast<double>(attender.memory().size()) / 1e9;
  const std::vector<double> ratios = Ratios(read, decode);
  Print({"cpu_decode_over_read_bw",
         Median(ratios),
         "x",
         absl::StrFormat("%d threads reading: %.1f GB/s; decode (%s): %.1f GB/s", pool.threads(),
                         gigabytes / Median(read), kernels::IsaName(kernels::BestIsa()),
                         gigabytes / Median(decode)),
         Median(ratios),
         {Goal::kAtLeast, 0.7, ""}},
        ratios);
  return absl::OkStatus();
}

absl::Status MeasurePrefill() {
  kernels::ThreadPool pool;
  Attender attender(pool);
  // Products of queries with keys and of weights with values, of visible pairs only.
  const double pairs = kChunk * (kTokens - (kChunk - 1) / 2.0);
  const double gflop = 4.0 * pairs * kQueryHeads * GeometryOf(kernels::DType::kBf16).head_dim / 1e9;
  std::vector<double> prefill;
  std::vector<double> peak;
  Pairs([&] { return gflop / attender.PrefillSeconds(); }, [&] { return FmaGflops(pool); }, prefill,
        peak);
  const std::vector<double> ratios = Ratios(prefill, peak);
  Print({"cpu_prefill_over_fma",
         Median(ratios),
         "x",
         absl::StrFormat("%d threads multiplying: %.0f GFLOP/s; %d tokens over %d: %.0f GFLOP/s",
                         pool.threads(), Median(peak), kChunk, kTokens - kChunk, Median(prefill)),
         Median(ratios),
         {}},
        ratios);
  return absl::OkStatus();
}

// Time of a decode step and of a prefill chunk over codes, in those over bf16.
absl::Status MeasureCodes(const std::string& name, kernels::DType dtype) {
  kernels::ThreadPool pool;
  Attender codes(pool, dtype);
  Attender plain(pool);
  std::vector<double> decode;
  std::vector<double> plain_decode;
  Pairs([&] { return codes.DecodeSeconds(); }, [&] { return plain.DecodeSeconds(); }, decode,
        plain_decode);
  std::vector<double> prefill;
  std::vector<double> plain_prefill;
  Pairs([&] { return codes.PrefillSeconds(); }, [&] { return plain.PrefillSeconds(); }, prefill,
        plain_prefill);
  const std::vector<double> ratios = Ratios(decode, plain_decode);
  Print({name,
         Median(ratios),
         "x",
         absl::StrFormat("a step over bf16: %.2f ms, over codes: %.2f ms, of %.2f of the bytes; "
                         "prefill: %.2f x",
                         Median(plain_decode) * 1e3, Median(decode) * 1e3,
                         static_cast<double>(codes.memory().size()) /
                             static_cast<double>(plain.memory().size()),
                         Median(Ratios(prefill, plain_prefill))),
         Median(ratios),
         {Goal::kAtMost, 1, ""}},
        ratios);
  return absl::OkStatus();
}

absl::Status MeasureTorch(const std::string& script) {
  kernels::ThreadPool pool;
  absl::StatusOr<std::unique_ptr<TorchPeer>> torch = TorchPeer::Start(script, pool.threads());
  if (absl::IsNotFound(torch.status())) {
    absl::FPrintF(stderr, "cpu_decode_over_torch: left out: %s\n", torch.status().message());
    return absl::OkStatus();
  }
  if (!torch.ok()) return torch.status();
  Attender attender(pool);
  absl::Status status;
  std::vector<double> ours;
  std::vector<double> theirs;
  Pairs([&] { return attender.DecodeSeconds(); },
        [&] {
          const absl::StatusOr<double> seconds = (*torch)->Run();
          status.Update(seconds.status());
          return seconds.value_or(1);
        },
        ours, theirs);
  if (!status.ok()) return status;
  const std::vector<double> ratios = Ratios(ours, theirs);
  Print({"cpu_decode_over_torch",
         Median(ratios),
         "x",
         absl::StrFormat("PyTorch %s: %.2f ms a step; ours: %.2f ms", (*torch)->variant(),
                         Median(theirs) * 1e3, Median(ours) * 1e3),
         Median(ratios),
         {Goal::kAtMost, 1, ""}},
        ratios);
  return absl::OkStatus();
}

}  // namespace
}  // namespace larder::bench

int main(int argc, char** argv) {
  using namespace larder::bench;
  std::vector<std::string> names(argv + 1, argv + argc);
  const std::string script = TakeFlag(names, "torch", "tests/bench/torch_sdpa.py");
  return RunBenchmarks(
      names,
      {{{"cpu_decode_over_read_bw"}, MeasureReadBandwidth},
       {{"cpu_prefill_over_fma"}, MeasurePrefill},
       {{"cpu_decode_e4m3_over_bf16"},
        [] { return MeasureCodes("cpu_decode_e4m3_over_bf16", larder::kernels::DType::kF8E4M3); }},
       {{"cpu_decode_i8_over_bf16"},
        [] { return MeasureCodes("cpu_decode_i8_over_bf16", larder::kernels::DType::kI8); }},
       {{"cpu_decode_over_torch"}, [&] { return MeasureTorch(script); }}});
}
