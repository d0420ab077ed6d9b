// The forward pass for GPUs, on the emulated one (tests/gpu/emulation): against torch's logits,
// against the CPU's, and against itself with sequences cut and batched in other ways.

#include "client/worker/forward_pass_cuda.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <utility>

#include "client/worker/block_pool.h"
#include "client/worker/engine.h"
#include "client/worker/kv_blocks.h"
#include "client/worker/sampler.h"
#include "client/worker/transformer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/gpu/emulation/stream.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

using testing::HasSubstr;

std::string ModelDirectory(const std::string& name) {
  return std::string(LARDER_TEST_MODELS) + "/" + name;
}

nlohmann::json Reference(const std::string& name) {
  std::ifstream file(ModelDirectory(name) + "/reference.json");
  return nlohmann::json::parse(file);
}

std::unique_ptr<Transformer> LoadModel(const std::string& name, TransformerOptions options) {
  absl::StatusOr<Weights> weights = Weights::Load(ModelDirectory(name));
  EXPECT_TRUE(weights.ok()) << weights.status();
  auto transformer = Transformer::Create(*std::move(weights), options);
  EXPECT_TRUE(transformer.ok()) << transformer.status();
  return *std::move(transformer);
}

// K/V in the model's own type.
TransformerOptions OnGpu(const std::string& name) {
  return {.device = Device::kCuda, .kv_dtype = name == "tiny_llama3" ? Dtype::kF16 : Dtype::kBf16};
}

// Logits of all of `tokens`, computed in pieces of these lengths, the last one again and again.
std::vector<float> LogitsInPieces(Transformer& transformer, const std::vector<uint32_t>& tokens,
                                  const std::vector<size_t>& lengths) {
  std::mt19937 random(1);
  TestBlocks blocks(transformer.geometry(), tokens.size(), random);
  const size_t vocab = transformer.config().vocab;
  std::vector<float> logits(tokens.size() * vocab);
  size_t done = 0;
  for (size_t i = 0; done < tokens.size(); ++i) {
    const size_t count = std::min(lengths[std::min(i, lengths.size() - 1)], tokens.size() - done);
    const Chunk chunk{.tokens = std::span(tokens).subspan(done, count),
                      .position = static_cast<uint32_t>(done),
                      .blocks = blocks.table(),
                      .logits = Logits::kAll};
    const absl::Status status =
        transformer.Forward({&chunk, 1}, std::span(logits).subspan(done * vocab, count * vocab));
    EXPECT_TRUE(status.ok()) << status;
    done += count;
    EXPECT_TRUE(blocks.Untouched(done, tokens.size()));
  }
  return logits;
}

double LargestDifference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - b[i]);
    if (!(difference <= largest)) largest = difference;  // a NaN stays
  }
  return largest;
}

class CudaForwardPassTest : public testing::TestWithParam<const char*> {
 protected:
  const std::string name_ = GetParam();
  const nlohmann::json reference_ = Reference(name_);
  // What torch's own bf16 is off by, and twice that between two that are both rounded.
  const double torch_difference_ = reference_["bf16_difference"].get<double>();
  const double tolerance_ = 2 * torch_difference_;
  const std::unique_ptr<Transformer> gpu_ = LoadModel(name_, OnGpu(name_));

  std::vector<uint32_t> Tokens(size_t item) const {
    return reference_["cases"][item]["tokens"].get<std::vector<uint32_t>>();
  }
};

TEST_P(CudaForwardPassTest, IsAsCloseToTorchAsTorchsBf16) {
  double largest = 0;
  for (const nlohmann::json& item : reference_["cases"]) {
    const auto tokens = item["tokens"].get<std::vector<uint32_t>>();
    const std::vector<float> logits = LogitsInPieces(*gpu_, tokens, {tokens.size()});
    for (size_t i = 0; i < item["rows"].size(); ++i) {
      const auto expected = item["logits"][i].get<std::vector<float>>();
      const size_t first = item["rows"][i].get<size_t>() * expected.size();
      largest = std::max(
          largest, LargestDifference(expected, std::span(logits).subspan(first, expected.size())));
    }
  }
  EXPECT_LT(largest, torch_difference_);
}

TEST_P(CudaForwardPassTest, ComputesWhatTheCpuComputes) {
  const auto cpu = LoadModel(name_, {.kv_dtype = Dtype::kF32, .arithmetic = Arithmetic::kF32});
  const std::vector<uint32_t> tokens = Tokens(2);
  EXPECT_LT(LargestDifference(LogitsInPieces(*gpu_, tokens, {tokens.size()}),
                              LogitsInPieces(*cpu, tokens, {tokens.size()})),
            tolerance_);
}

// Prefill in one piece, in pieces that begin and end within blocks, and Decode for every token.
TEST_P(CudaForwardPassTest, PiecesDoNotMatter) {
  const std::vector<uint32_t> tokens = Tokens(2);
  const std::vector<float> whole = LogitsInPieces(*gpu_, tokens, {tokens.size()});
  EXPECT_LT(LargestDifference(whole, LogitsInPieces(*gpu_, tokens, {7, 64, 1, 2, 33})), tolerance_);
  EXPECT_LT(LargestDifference(whole, LogitsInPieces(*gpu_, tokens, {130, 1})), tolerance_);
}

// Keys enough for Decode to share a row out among several blocks and merge them, step after step.
TEST_P(CudaForwardPassTest, LongRowsAreShared) {
  std::mt19937 random(4);
  const std::vector<uint32_t> tokens = RandomTokens(random, 330, 256);
  const size_t vocab = gpu_->config().vocab;
  const std::vector<float> whole = LogitsInPieces(*gpu_, tokens, {tokens.size()});
  const std::vector<float> decoded = LogitsInPieces(*gpu_, tokens, {tokens.size() - 3, 1});
  const auto last = [&](const std::vector<float>& logits) {
    return std::span(logits).last(3 * vocab);
  };
  EXPECT_LT(LargestDifference(last(whole), last(decoded)), tolerance_);
}

// Greedy, token by token from K/V, as torch without any; where its two best are not too near.
TEST_P(CudaForwardPassTest, SameContinuation) {
  size_t decided = 0;
  for (const nlohmann::json& item : reference_["cases"]) {
    auto tokens = item["tokens"].get<std::vector<uint32_t>>();
    const auto expected = item["continuation"].get<std::vector<uint32_t>>();
    const size_t prompt = tokens.size();
    tokens.insert(tokens.end(), expected.begin(), expected.end());
    const std::vector<float> logits = LogitsInPieces(*gpu_, tokens, {prompt, 1});
    const size_t vocab = gpu_->config().vocab;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (item["margins"][i].get<double>() < tolerance_) continue;
      ++decided;
      EXPECT_EQ(Greedy(std::span(logits).subspan((prompt - 1 + i) * vocab, vocab)), expected[i])
          << item["name"] << ", token " << i;
    }
  }
  EXPECT_GE(decided, 10u);
}

// Sequences of other lengths, of one token and of several, in one step.
TEST_P(CudaForwardPassTest, SequencesOfAStepAreApart) {
  const std::vector<uint32_t> tokens = Tokens(2);
  const std::vector<float> whole = LogitsInPieces(*gpu_, tokens, {tokens.size()});
  const size_t vocab = gpu_->config().vocab;
  constexpr size_t kDone[] = {64, 0, 100, 31, 16};
  constexpr size_t kNow[] = {1, 20, 1, 2, 17};
  std::mt19937 random(2);
  std::vector<std::unique_ptr<TestBlocks>> blocks;
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < std::size(kDone); ++i) {
    blocks.push_back(std::make_unique<TestBlocks>(gpu_->geometry(), tokens.size(), random));
    const Chunk before{.tokens = std::span(tokens).first(kDone[i]),
                       .blocks = blocks[i]->table(),
                       .logits = Logits::kNone};
    if (kDone[i] > 0) {
      ASSERT_TRUE(gpu_->Forward({&before, 1}, {}).ok());
    }
    chunks.push_back({.tokens = std::span(tokens).subspan(kDone[i], kNow[i]),
                      .position = static_cast<uint32_t>(kDone[i]),
                      .blocks = blocks[i]->table(),
                      .logits = i == 3 ? Logits::kNone : Logits::kLast});
  }
  std::vector<float> logits(LogitRows(chunks) * vocab);
  ASSERT_TRUE(gpu_->Forward(chunks, logits).ok());
  std::span<const float> rows = logits;
  for (size_t i = 0; i < chunks.size(); ++i) {
    if (chunks[i].logits == Logits::kNone) continue;
    const size_t last = kDone[i] + kNow[i] - 1;
    EXPECT_LT(LargestDifference(rows.first(vocab), std::span(whole).subspan(last * vocab, vocab)),
              tolerance_)
        << "sequence " << i;
    rows = rows.subspan(vocab);
    EXPECT_TRUE(blocks[i]->Untouched(last + 1, tokens.size())) << "sequence " << i;
  }
}

// A window and its sinks are the CPU's.
TEST_P(CudaForwardPassTest, WindowsAreTheCpus) {
  TransformerOptions options = OnGpu(name_);
  options.window = AttentionWindow{.sink_tokens = 4, .window_tokens = 24};
  const auto gpu = LoadModel(name_, options);
  const auto cpu = LoadModel(
      name_, {.kv_dtype = Dtype::kF32, .window = options.window, .arithmetic = Arithmetic::kF32});
  std::vector<uint32_t> tokens = Tokens(2);
  tokens.resize(100);
  const std::vector<float> expected = LogitsInPieces(*cpu, tokens, {tokens.size()});
  EXPECT_LT(LargestDifference(expected, LogitsInPieces(*gpu, tokens, {90, 1})), tolerance_);
  // And a window matters.
  EXPECT_GT(LargestDifference(expected, LogitsInPieces(*gpu_, tokens, {90, 1})), tolerance_);
}

// A fork shares whole blocks and goes on in a copy of the last; a block made private is a copy.
TEST_P(CudaForwardPassTest, ForksGoOnAlone) {
  const std::vector<uint32_t> tokens = Tokens(2);
  const size_t vocab = gpu_->config().vocab;
  constexpr uint32_t kPrompt = 41;  // two blocks of 16, and 9 tokens
  auto pool = *BlockPool::Create(gpu_->block_memory(), 1 << 20, gpu_->geometry().BlockBytes());
  const auto forward = [&](KvBlocks& blocks, std::span<const uint32_t> part, uint32_t position) {
    blocks.Grow(position + part.size(), position + part.size());
    std::vector<float> logits(vocab);
    const Chunk chunk{.tokens = part, .position = position, .blocks = blocks.table()};
    EXPECT_TRUE(gpu_->Forward({&chunk, 1}, logits).ok());
    return logits;
  };
  KvBlocks first(*pool, 16);
  forward(first, std::span(tokens).first(kPrompt), 0);
  KvBlocks second = first.Fork(kPrompt);
  EXPECT_EQ(second.table()[1], first.table()[1]);
  EXPECT_NE(second.table()[2], first.table()[2]);
  // The first goes on with something else, in what would be the second's place if they shared it.
  const std::vector<uint32_t> other(7, 5);
  forward(first, other, kPrompt);
  second.MakePrivate(1);
  EXPECT_NE(second.table()[1], first.table()[1]);
  const std::vector<float> logits = forward(second, std::span(tokens).subspan(kPrompt, 3), kPrompt);
  const std::vector<float> whole = LogitsInPieces(*gpu_, tokens, {tokens.size()});
  EXPECT_LT(LargestDifference(logits, std::span(whole).subspan((kPrompt + 2) * vocab, vocab)),
            tolerance_);
}

// Requests through the engine: chunked prompts, batched, with samples that fork.
TEST_P(CudaForwardPassTest, AnEngineGenerates) {
  auto engine =
      Engine::Create(*gpu_, {.chunk_tokens = 50, .sequences_max = 6, .pool_bytes = 4 << 20});
  ASSERT_TRUE(engine.ok()) << engine.status();
  const nlohmann::json& cases = reference_["cases"];
  for (const nlohmann::json& item : cases) {
    Request request;
    request.prompt = item["tokens"].get<std::vector<uint32_t>>();
    request.new_tokens_max = 6;
    request.samples = 2;
    ASSERT_TRUE((*engine)->Submit(std::move(request)).ok());
  }
  ASSERT_TRUE((*engine)->Run().ok());
  std::vector<Result> results = (*engine)->TakeResults();
  ASSERT_EQ(results.size(), cases.size());
  for (const Result& result : results) {
    const nlohmann::json& item = cases[result.id - 1];
    for (const Completion& completion : result.completions) {
      ASSERT_EQ(completion.tokens.size(), 6u);
      for (size_t i = 0; i < 6 && item["margins"][i].get<double>() >= tolerance_; ++i) {
        EXPECT_EQ(completion.tokens[i], item["continuation"][i].get<uint32_t>())
            << item["name"] << ", token " << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, CudaForwardPassTest, testing::Values("tiny_qwen2", "tiny_llama3"),
                         [](const auto& info) { return std::string(info.param); });

// K/V in another type than the products'.
TEST(CudaForwardPass, KvMayHaveAnotherType) {
  const auto cpu = LoadModel("tiny_llama3", {.arithmetic = Arithmetic::kF32});
  const auto gpu = LoadModel("tiny_llama3", {.device = Device::kCuda, .kv_dtype = Dtype::kBf16});
  std::mt19937 random(3);
  const std::vector<uint32_t> tokens = RandomTokens(random, 40, 256);
  EXPECT_LT(LargestDifference(LogitsInPieces(*gpu, tokens, {30, 1}),
                              LogitsInPieces(*cpu, tokens, {tokens.size()})),
            2 * Reference("tiny_llama3")["bf16_difference"].get<double>());
}

// Prefill and Decode over codes, with a window and sinks: the CPU's logits over the same codes, up
// to what 16-bit products change and, as a code may then be the next one, to what having codes
// does.
TEST(CudaForwardPass, CodesAreTheCpus) {
  ModelConfig config = SmallConfig();
  config.layers = 2;
  config.head_dim = 64;
  config.ffn = 152;
  std::mt19937 random(5);
  const std::vector<uint32_t> tokens = RandomTokens(random, 110, config.vocab);
  const auto logits = [&](Device device, Dtype kv_dtype) {
    const auto transformer = SmallTransformer(
        {.device = device,
         .kv_dtype = kv_dtype,
         .window = AttentionWindow{.sink_tokens = 4, .window_tokens = 70},
         .arithmetic = device == Device::kCpu ? Arithmetic::kF32 : Arithmetic::kAuto},
        config);
    return LogitsInPieces(*transformer, tokens, {81, 1, 25, 1});
  };
  const std::vector<float> exact = logits(Device::kCpu, Dtype::kF32);
  const double products = LargestDifference(exact, logits(Device::kCuda, Dtype::kBf16));
  for (const Dtype dtype : {Dtype::kF8E4M3, Dtype::kI8}) {
    SCOPED_TRACE(DtypeName(dtype));
    const std::vector<float> cpu = logits(Device::kCpu, dtype);
    const double codes = LargestDifference(exact, cpu);
    EXPECT_LT(LargestDifference(cpu, logits(Device::kCuda, dtype)), products + codes);
  }
}

// Sequences that take part in some steps and not in others, and grow past blocks, pieces and waves
// of the GPU: as graphs and launched one by one, every bit of logits and K/V is the same.
TEST(CudaForwardPass, GraphsChangeNoBit) {
  ModelConfig config = SmallConfig();
  config.layers = 1;
  config.ffn = 152;
  constexpr uint32_t kPrompts[] = {15, 60, 245};
  constexpr uint32_t kSteps = 40;
  constexpr uint32_t kTokens = 245 + kSteps;
  struct Side {
    std::unique_ptr<Transformer> transformer;
    std::vector<std::unique_ptr<TestBlocks>> blocks;
    std::vector<float> logits;
  } sides[2];
  std::mt19937 random(6);
  const std::vector<uint32_t> tokens = RandomTokens(random, kTokens, config.vocab);
  const auto forward = [&](Side& side, std::span<const uint32_t> begins, uint32_t sequences,
                           uint32_t count) {
    std::vector<Chunk> chunks;
    for (uint32_t i = 0; i < std::size(kPrompts); ++i) {
      if ((sequences >> i & 1) == 0) continue;
      chunks.push_back({.tokens = std::span(tokens).subspan(begins[i], count),
                        .position = begins[i],
                        .blocks = side.blocks[i]->table()});
    }
    side.logits.assign(LogitRows(chunks) * config.vocab, 0);
    const absl::Status status = side.transformer->Forward(chunks, side.logits);
    EXPECT_TRUE(status.ok()) << status;
  };
  for (Side& side : sides) {
    side.transformer =
        SmallTransformer({.device = Device::kCuda, .cuda_graphs = &side == sides}, config);
    for (uint32_t i = 0; i < std::size(kPrompts); ++i) {
      side.blocks.push_back(
          std::make_unique<TestBlocks>(side.transformer->geometry(), kTokens, random));
      const uint32_t begins[] = {0, 0, 0};
      forward(side, begins, 1 << i, kPrompts[i]);
    }
  }
  const uint64_t launched_before = emulation::graphs_launched;
  std::vector<uint32_t> ends(std::begin(kPrompts), std::end(kPrompts));
  for (uint32_t step = 0; step < kSteps; ++step) {
    const uint32_t sequences = random() % 3 == 0 ? 1 + random() % 7 : 7;
    for (Side& side : sides) forward(side, ends, sequences, 1);
    ASSERT_EQ(sides[0].logits, sides[1].logits) << "step " << step;
    for (uint32_t i = 0; i < ends.size(); ++i) ends[i] += sequences >> i & 1;
  }
  for (uint32_t i = 0; i < ends.size(); ++i) {
    EXPECT_EQ(sides[0].blocks[i]->Gather(ends[i]), sides[1].blocks[i]->Gather(ends[i]));
  }
  EXPECT_GT(emulation::graphs_launched - launched_before, kSteps / 2);
}

TEST(CudaForwardPass, RefusesWhatHasNoKernel) {
  const auto refused = [](TransformerOptions options, ModelConfig config = SmallConfig()) {
    config.ffn = 152;
    options.device = Device::kCuda;
    auto weights = Weights::Random(config, 1);
    EXPECT_TRUE(weights.ok()) << weights.status();
    const absl::Status status = Transformer::Create(*std::move(weights), options).status();
    EXPECT_EQ(status.code(),
              status.ok() ? absl::StatusCode::kOk : absl::StatusCode::kUnimplemented);
    return std::string(status.message());
  };
  EXPECT_EQ(refused({}), "");
  // SmallConfig's heads are of 16.
  EXPECT_THAT(refused({.kv_dtype = Dtype::kI8}),
              HasSubstr("head_dim: 16; allowed on cuda for kv_dtype i8: 64"));
  EXPECT_THAT(refused({.kv_dtype = Dtype::kF32}),
              HasSubstr("kv_dtype: f32; allowed on cuda: bf16"));
  EXPECT_THAT(refused({.keys_before_rope = true}), HasSubstr("keys_before_rope: true;"));
  EXPECT_THAT(refused({.arithmetic = Arithmetic::kF32}), HasSubstr("arithmetic: f32;"));
  ModelConfig odd = SmallConfig();
  odd.head_dim = 24;
  EXPECT_THAT(refused({}, odd), HasSubstr("head_dim: 24; allowed on cuda for kv_dtype bf16: 16"));
}

// Another library or device, another revision: K/V of the CPU are not K/V of the GPU.
TEST(CudaForwardPass, RevisionNamesDeviceAndLibrary) {
  const auto gpu = LoadModel("tiny_qwen2", OnGpu("tiny_qwen2"));
  const auto cpu = LoadModel("tiny_qwen2", {});
  EXPECT_THAT(gpu->geometry().weights_revision, HasSubstr(" cuda bf16 sm_0 loops"));
  EXPECT_NE(gpu->geometry().weights_revision, cpu->geometry().weights_revision);
}

}  // namespace
}  // namespace larder::worker
