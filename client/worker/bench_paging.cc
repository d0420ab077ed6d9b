// Experiment "paging": what part of the K/V memory of 50 sequences holds no token, counted on the
// block pool that the engine uses.
//
//   contiguous   each sequence reserves the longest length there may be (2,048 tokens)
//   paged        each sequence has the blocks that its tokens reached
//
// Lengths are drawn: prompts log-normal with a median of 100 tokens (sigma 1), answers with a
// median of 250 (sigma 0.8), close to published conversations (ShareGPT: means of 161 and 338,
// Kwon et al. 2023, figure 11). All sequences decode a token a step until each has its length.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/bench.h"
#include "client/worker/block_pool.h"
#include "client/worker/kv_blocks.h"

namespace larder::worker::bench {
namespace {

constexpr uint64_t kSeed = 50;
constexpr int kSequences = 50;
constexpr uint32_t kLongest = 2'048;
constexpr double kWasteMax = 0.04;
constexpr uint32_t kSamples = 4;

struct Lengths {
  uint32_t prompt;
  uint32_t all;
};

std::vector<Lengths> Draw() {
  std::mt19937_64 random(kSeed);
  std::lognormal_distribution<double> prompts(std::log(100), 1), answers(std::log(250), 0.8);
  std::vector<Lengths> lengths;
  for (int i = 0; i < kSequences; ++i) {
    const double prompt = std::clamp(prompts(random), 1.0, kLongest - 1.0);
    const double answer = std::clamp(answers(random), 1.0, kLongest - prompt);
    lengths.push_back({static_cast<uint32_t>(prompt),
                       static_cast<uint32_t>(prompt) + static_cast<uint32_t>(answer)});
  }
  return lengths;
}

// Token places that are taken and hold no token, as a part of those taken.
double Waste(uint64_t tokens, uint64_t places) {
  return 1 - static_cast<double>(tokens) / static_cast<double>(places);
}

absl::Status MeasureWaste(Bench& bench, BlockPool& pool, uint32_t block_tokens) {
  const std::vector<Lengths> lengths = Draw();
  std::vector<KvBlocks> sequences;
  for (int i = 0; i < kSequences; ++i) sequences.emplace_back(pool, block_tokens);
  const uint64_t reserved = uint64_t{kSequences} * kLongest;
  Curve paged{.title = "paged"}, contiguous{.title = "contiguous, longest length reserved"};
  double waste = 0, worst = 0, at_start = 0;
  uint64_t tokens = 0;
  bool growing = true;
  for (uint32_t step = 0; growing; ++step) {
    growing = false;
    tokens = 0;
    for (int i = 0; i < kSequences; ++i) {
      const uint32_t length = std::min(lengths[i].prompt + step, lengths[i].all);
      growing = growing || length < lengths[i].all;
      sequences[i].Grow(length, length);
      tokens += length;
    }
    waste = Waste(tokens, pool.used() * block_tokens);
    worst = std::max(worst, waste);
    if (step == 0) at_start = waste;
    if (step % 16 == 0) {
      paged.points.emplace_back(step, 100 * waste);
      contiguous.points.emplace_back(step, 100 * Waste(tokens, reserved));
    }
  }
  if (waste >= kWasteMax) {
    return absl::InternalError(absl::StrCat("paging: ", waste, " of the memory is wasted"));
  }
  const auto row = [&](const char* name, uint64_t places, const std::string& start,
                       const std::string& most) {
    const double mib = static_cast<double>(places / block_tokens * pool.block_bytes()) / (1 << 20);
    return std::vector<std::string>{name,
                                    absl::StrCat(tokens),
                                    absl::StrCat(places),
                                    Fixed(mib, 1),
                                    start,
                                    most,
                                    Fixed(100 * Waste(tokens, places), 2)};
  };
  Table table{.name = "paging",
              .heading = absl::StrCat(kSequences, " sequences, blocks of ", block_tokens,
                                      " tokens; waste: places without a token"),
              .titles = {"memory", "tokens", "places taken", "MiB", "waste at start %",
                         "waste at worst %", "waste at end %"}};
  table.rows.push_back(row("contiguous", reserved, Fixed(contiguous.points.front().second, 2),
                           Fixed(contiguous.points.front().second, 2)));
  table.rows.push_back(
      row("paged", pool.used() * block_tokens, Fixed(100 * at_start, 2), Fixed(100 * worst, 2)));
  absl::Status added = bench.report().Add(table);
  added.Update(bench.report().Add(
      Plot{.name = "paging",
           .title = absl::StrCat("K/V memory without a token, ", kSequences, " sequences"),
           .x_label = "decoding step (tokens a sequence)",
           .y_label = "waste (% of the memory taken)",
           .curves = {contiguous, paged}}));
  return added;
}

// Samples of one prompt: they share its blocks, and each has blocks of its own from where it
// writes. Counts the blocks in use at every stage.
absl::Status CountForks(BlockPool& pool, uint32_t block_tokens, uint32_t prompt, Table& table) {
  const uint64_t before = pool.used();
  const auto blocks_of = [&](uint64_t tokens) {
    return (tokens + block_tokens - 1) / block_tokens;
  };
  KvBlocks first(pool, block_tokens);
  first.Grow(prompt, prompt);
  std::vector<KvBlocks> samples;
  for (uint32_t i = 1; i < kSamples; ++i) samples.push_back(first.Fork(prompt));
  const uint64_t whole = prompt / block_tokens;
  const uint64_t own_tail = prompt % block_tokens == 0 ? 0 : 1;
  absl::Status holds = CheckCount(pool.used() - before, whole + kSamples * own_tail,
                                  "paging, blocks after the fork");
  for (const uint32_t written : {0u, 1u, 100u}) {
    const uint64_t length = uint64_t{prompt} + written;
    first.Grow(length, length);
    for (KvBlocks& sample : samples) sample.Grow(length, length);
    const uint64_t used = pool.used() - before;
    const uint64_t copied = kSamples * blocks_of(length);
    holds.Update(CheckCount(used, whole + kSamples * (blocks_of(length) - whole),
                            "paging, blocks of diverged samples"));
    table.rows.push_back(
        {absl::StrCat(prompt), absl::StrCat(written), absl::StrCat(used), absl::StrCat(copied),
         Fixed(100 - 100.0 * static_cast<double>(used) / static_cast<double>(copied), 1)});
  }
  return holds;
}

}  // namespace

absl::Status RunPaging(Bench& bench) {
  absl::StatusOr<Transformer*> model = bench.LoadModel();
  if (!model.ok()) return model.status();
  const uint32_t block_tokens = (*model)->options().block_tokens;
  absl::StatusOr<std::unique_ptr<BlockPool>> pool =
      BlockPool::Create((*model)->block_memory(), kPoolBytes, (*model)->geometry().BlockBytes());
  if (!pool.ok()) return pool.status();
  if (absl::Status done = MeasureWaste(bench, **pool, block_tokens); !done.ok()) return done;
  Table forks{
      .name = "paging_forks",
      .heading = absl::StrCat(kSamples,
                              " samples of one prompt share its blocks until "
                              "they write; blocks in use, counted"),
      .titles = {"prompt tokens", "tokens written each", "blocks", "without sharing", "saved %"}};
  // A prompt that ends in a block, and one that ends with it.
  for (const uint32_t prompt : {64 * block_tokens - 3, 64 * block_tokens}) {
    absl::Status counted = CountForks(**pool, block_tokens, prompt, forks);
    if (!counted.ok()) return counted;
  }
  absl::Status all_back = CheckCount((*pool)->used(), 0, "paging, blocks left");
  all_back.Update(bench.report().Add(forks));
  return all_back;
}

}  // namespace larder::worker::bench
