#include "client/worker/engine.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/worker/test_daemon.h"
#include "tests/worker/test_models.h"

namespace larder::worker {
namespace {

// Blocks as the fake daemon has them: 4 tokens, 4,096 bytes.
ModelConfig Config() {
  ModelConfig config = SmallConfig();
  config.layers = 2;
  config.kv_heads = 2;
  config.heads = 4;
  config.head_dim = 64;
  config.max_positions = 128;
  return config;
}

class EngineTest : public testing::Test {
 protected:
  EngineTest() { EXPECT_EQ(transformer_->geometry().BlockBytes(), kBlockBytes); }

  std::unique_ptr<Engine> MakeEngine(EngineOptions options = {}) {
    absl::StatusOr<std::unique_ptr<Engine>> engine =
        Engine::Create(*transformer_, std::move(options));
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  }

  std::vector<uint32_t> Prompt(size_t tokens) {
    return RandomTokens(random_, tokens, transformer_->config().vocab);
  }

  static Request Ask(std::vector<uint32_t> prompt, uint32_t new_tokens_max) {
    Request request;
    request.prompt = std::move(prompt);
    request.new_tokens_max = new_tokens_max;
    return request;
  }

  // The request's result in an engine of its own.
  Result Alone(const Request& request) {
    const std::unique_ptr<Engine> engine = MakeEngine();
    EXPECT_TRUE(engine->Submit(request).ok());
    EXPECT_TRUE(engine->Run().ok());
    return engine->TakeResults().at(0);
  }

  void ExpectSame(const Result& a, const Result& b) {
    ASSERT_EQ(a.completions.size(), b.completions.size());
    for (size_t i = 0; i < a.completions.size(); ++i) {
      EXPECT_EQ(a.completions[i].tokens, b.completions[i].tokens);
      EXPECT_EQ(a.completions[i].finish, b.completions[i].finish);
    }
  }

  std::mt19937 random_{1};
  const std::unique_ptr<Transformer> transformer_ =
      SmallTransformer({.block_tokens = kBlockTokens, .rows_max = 1'024}, Config());
};

TEST_F(EngineTest, RequestsJoinAndLeaveBetweenSteps) {
  const std::unique_ptr<Engine> engine = MakeEngine({.chunk_tokens = 8, .sequences_max = 3});
  std::map<uint64_t, Request> requests;
  std::map<uint64_t, Result> results;
  const auto submit = [&](size_t prompt, uint32_t new_tokens) {
    Request request = Ask(Prompt(prompt), new_tokens);
    const absl::StatusOr<uint64_t> id = engine->Submit(request);
    ASSERT_TRUE(id.ok()) << id.status();
    requests[*id] = std::move(request);
  };
  submit(30, 10);
  submit(5, 40);
  for (int step = 0; !engine->idle(); ++step) {
    if (step % 5 == 0 && step < 40) submit(1 + step, 3 + step % 7);
    ASSERT_TRUE(engine->Step().ok());
    for (Result& result : engine->TakeResults()) {
      const uint64_t id = result.id;
      results[id] = std::move(result);
    }
  }
  EXPECT_EQ(engine->stats().sequences_peak, 3u);
  ASSERT_EQ(results.size(), requests.size());
  for (const auto& [id, request] : requests) {
    SCOPED_TRACE(testing::Message() << "request " << id);
    ExpectSame(results[id], Alone(request));
    EXPECT_EQ(results[id].completions[0].finish, Finish::kLength);
    EXPECT_EQ(results[id].stats.computed_tokens,
              request.prompt.size() + request.new_tokens_max - 1);
  }
}

// A long prompt does not hold up those that decode: each step gives each of them a token.
TEST_F(EngineTest, PrefillsInChunksBesideDecoding) {
  const std::unique_ptr<Engine> engine = MakeEngine({.chunk_tokens = 8});
  Request first = Ask(Prompt(4), 20);
  int tokens = 0;
  first.on_token = [&](uint32_t, uint32_t) { ++tokens; };
  ASSERT_TRUE(engine->Submit(first).ok());
  ASSERT_TRUE(engine->Submit(Ask(Prompt(80), 1)).ok());
  for (int step = 1; step <= 11; ++step) {
    ASSERT_TRUE(engine->Step().ok());
    EXPECT_EQ(tokens, step);
    EXPECT_EQ(engine->TakeResults().size(), step == 11 ? 1u : 0u);  // 4 and 10 times 8 tokens
  }
}

TEST_F(EngineTest, SamplesAreThoseOfRequestsOfTheirOwn) {
  Request request = Ask(Prompt(21), 12);
  request.samples = 3;
  request.sampling.temperature = 1;
  const Result together = Alone(request);
  EXPECT_NE(together.completions[0].tokens, together.completions[1].tokens);
  EXPECT_NE(together.completions[1].tokens, together.completions[2].tokens);
  // The first sample does not depend on how many there are; the prompt is computed once.
  request.samples = 1;
  EXPECT_EQ(Alone(request).completions[0].tokens, together.completions[0].tokens);
  EXPECT_EQ(together.stats.computed_tokens, 21u + 3 * 11);
  EXPECT_EQ(together.stats.new_tokens, 36u);
}

TEST_F(EngineTest, EndsAtTheEndTokenAndAtTheContext) {
  Request request = Ask(Prompt(100), 1'000);
  const Result full = Alone(request);
  EXPECT_EQ(full.completions[0].tokens.size(), 29u);  // one past 128 needs no K/V
  EXPECT_EQ(full.completions[0].finish, Finish::kContext);
  request.end_token = full.completions[0].tokens[3];
  const Result ended = Alone(request);
  EXPECT_LE(ended.completions[0].tokens.size(), 4u);
  EXPECT_EQ(ended.completions[0].tokens.back(), *request.end_token);
  EXPECT_EQ(ended.completions[0].finish, Finish::kEnd);
}

// Two requests of 8 blocks (and one each for a recomputed token) in a pool of 10.
TEST_F(EngineTest, WaitsForRoomInThePool) {
  const std::unique_ptr<Engine> engine = MakeEngine({.pool_bytes = 10 * kBlockBytes});
  ASSERT_TRUE(engine->Submit(Ask(Prompt(24), 8)).ok());
  ASSERT_TRUE(engine->Submit(Ask(Prompt(24), 8)).ok());
  ASSERT_TRUE(engine->Run().ok());
  EXPECT_EQ(engine->TakeResults().size(), 2u);
  EXPECT_EQ(engine->stats().sequences_peak, 1u);
}

TEST_F(EngineTest, RefusesWhatCannotBe) {
  const std::unique_ptr<Engine> engine = MakeEngine({.pool_bytes = 10 * kBlockBytes});
  const auto refuse = [&](Request request, const std::string& message) {
    const absl::Status status = engine->Submit(std::move(request)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(status.message().find(message), std::string::npos) << status;
  };
  refuse(Ask({}, 1), "prompt (tokens): 0; allowed: 1 to 128");
  refuse(Ask(Prompt(129), 1), "prompt (tokens): 129; allowed: 1 to 128");
  refuse(Ask({transformer_->config().vocab}, 1), "prompt (token): ");
  refuse(Ask(Prompt(4), 0), "new_tokens_max: 0; allowed: 1 to");
  refuse(Ask(Prompt(40), 1), "up to 12 blocks of 4096 bytes; pool_bytes allows 10");
  Request request = Ask(Prompt(4), 1);
  request.samples = 9;
  refuse(request, "samples: 9; allowed: 1 to 8");
  request.samples = 1;
  request.end_token = transformer_->config().vocab;
  refuse(request, "end_token: ");
  EXPECT_TRUE(engine->idle());
  EXPECT_TRUE(
      absl::IsInvalidArgument(Engine::Create(*transformer_, {.chunk_tokens = 1'024}).status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(Engine::Create(*transformer_, {.sequences_max = 1'024}).status()));
}

// The first 8 blocks of a prompt are in the daemon's memory, which dies after the first of the
// three steps that the rest takes. They are still read, and the tokens are the same.
TEST_F(EngineTest, GoesOnWhenTheDaemonDies) {
  const Request request = Ask(Prompt(50), 20);
  const Result expected = Alone(request);
  TestDaemon daemon;
  std::vector<std::byte*> blocks;
  for (uint32_t i = 0; i < 8; ++i) blocks.push_back(daemon.HostBlock(i));
  const Chunk chunk{
      .tokens = std::span(request.prompt).first(32), .blocks = blocks, .logits = Logits::kNone};
  ASSERT_TRUE(transformer_->Forward({&chunk, 1}, {}).ok());
  daemon.AnswerLookup(8);
  daemon.AnswerReserve(8, 5);
  daemon.AnswerState(9, 4);
  const std::unique_ptr<Engine> engine = MakeEngine({.chunk_tokens = 6, .cache = daemon.options()});
  ASSERT_TRUE(engine->Submit(request).ok());
  ASSERT_TRUE(engine->Step().ok());
  daemon.Kill();
  ASSERT_TRUE(engine->Run().ok());
  const Result result = engine->TakeResults().at(0);
  ExpectSame(result, expected);
  EXPECT_EQ(result.stats.reused_host_tokens, 32u);
  EXPECT_EQ(result.stats.published_blocks, 1u);
  // 69 tokens are 18 blocks: 8 read, 5 reserved and written in place, 5 of the worker's own.
  EXPECT_EQ(result.stats.local_blocks, 5u);
}

// All of the prompt is cached: its last token is computed again, in a copy.
TEST_F(EngineTest, ReadsAPromptThatIsCachedToItsEnd) {
  const Request request = Ask(Prompt(32), 5);
  const Result expected = Alone(request);
  TestDaemon daemon;
  std::vector<std::byte*> blocks;
  for (uint32_t i = 0; i < 8; ++i) blocks.push_back(daemon.HostBlock(i));
  const Chunk chunk{.tokens = request.prompt, .blocks = blocks, .logits = Logits::kNone};
  ASSERT_TRUE(transformer_->Forward({&chunk, 1}, {}).ok());
  // What is computed again is the same to the bit, so a write shows only where it mends something.
  daemon.HostBlock(7)[(kBlockTokens - 1) * Config().head_dim * 2] ^= std::byte{0xff};
  const std::vector<std::byte> before(daemon.HostBlock(0), daemon.HostBlock(8));
  daemon.AnswerLookup(8);
  const std::unique_ptr<Engine> engine = MakeEngine({.cache = daemon.options()});
  ASSERT_TRUE(engine->Submit(request).ok());
  ASSERT_TRUE(engine->Run().ok());
  const Result result = engine->TakeResults().at(0);
  ExpectSame(result, expected);
  EXPECT_EQ(result.stats.reused_host_tokens, 31u);
  EXPECT_EQ(result.stats.computed_tokens, 1u + 4);
  EXPECT_EQ(std::memcmp(before.data(), daemon.HostBlock(0), before.size()), 0);
}

// A match whose restore is estimated to take a day is cut before it is waited for.
TEST_F(EngineTest, CutsWhatTakesLongerThanComputing) {
  TestDaemon daemon;
  v1::LookupPrefixResponse found;
  found.set_lease_id(7);
  found.set_matched_tokens(32);
  v1::Run& cold = *found.add_runs();
  cold.set_tier(v1::TIER_NVME);
  cold.set_blocks(8);
  found.mutable_restore()->set_microseconds(absl::ToInt64Microseconds(absl::Hours(24)));
  found.mutable_restore()->set_cut_blocks(1);
  daemon.fake().AnswerLookup(found);
  daemon.AnswerState(0, 0);
  const Request request = Ask(Prompt(40), 2);
  const std::unique_ptr<Engine> engine = MakeEngine({.cache = daemon.options()});
  ASSERT_TRUE(engine->Submit(request).ok());
  ASSERT_TRUE(engine->Run().ok());
  const Result result = engine->TakeResults().at(0);
  ExpectSame(result, Alone(request));
  EXPECT_EQ(result.stats.cut_blocks, 1u + 8);
  EXPECT_EQ(result.stats.reused_tokens(), 0u);
  EXPECT_GT(result.stats.restore_estimate, result.stats.compute_estimate);
  EXPECT_EQ(daemon.fake().Calls("Prefetch"), 0);
}

}  // namespace
}  // namespace larder::worker
