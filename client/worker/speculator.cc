#include "client/worker/speculator.h"

#include <algorithm>
#include <utility>

#include "client/worker/sampler.h"
#include "storage/check.h"

namespace larder::worker {
namespace {

// Whether the `count` tokens before `a` are those before `b`.
bool SameBefore(std::span<const uint32_t> tokens, size_t a, size_t b, size_t count) {
  return std::equal(tokens.begin() + a - count, tokens.begin() + a, tokens.begin() + b - count);
}

}  // namespace

std::vector<std::span<const uint32_t>> ProposeDrafts(std::span<const uint32_t> tokens,
                                                     const SpeculationOptions& options) {
  std::vector<std::span<const uint32_t>> drafts;
  if (options.draft_tokens == 0) return drafts;
  const size_t end = tokens.size();
  const auto is_new = [&](uint32_t first) {
    return std::none_of(drafts.begin(), drafts.end(),
                        [&](std::span<const uint32_t> draft) { return draft[0] == first; });
  };
  for (size_t match = options.match_max; match >= options.match_min; --match) {
    // `at`: where the draft would begin.
    for (size_t at = end - 1; at < end && at >= match && drafts.size() < options.branches; --at) {
      if (!SameBefore(tokens, at, end, match) || !is_new(tokens[at])) continue;
      drafts.push_back(tokens.subspan(at, std::min<size_t>(options.draft_tokens, end - at)));
    }
  }
  return drafts;
}

Speculator::Speculator(Transformer& transformer, KvBlocks blocks, std::vector<uint32_t> prompt,
                       uint32_t computed, const SpeculationOptions& options)
    : transformer_(transformer),
      options_(options),
      blocks_(std::move(blocks)),
      tokens_(std::move(prompt)),
      computed_(computed) {
  LARDER_CHECK(options_.branches > 0 && options_.match_min > 0);
  LARDER_CHECK(computed_ < tokens_.size());
  LARDER_CHECK(options_.branches * (options_.draft_tokens + 1) <= transformer.options().rows_max);
}

// All of the prompt but its last token, whose logits the first pass wants.
absl::Status Speculator::Prefill() {
  while (computed_ + 1 < tokens_.size()) {
    const auto left = static_cast<uint32_t>(tokens_.size() - 1 - computed_);
    const uint32_t count = std::min(left, transformer_.options().rows_max);
    blocks_.Grow(computed_ + count, tokens_.size());
    const Chunk chunk{.tokens = std::span(tokens_).subspan(computed_, count),
                      .position = computed_,
                      .blocks = blocks_.table(),
                      .logits = Logits::kNone};
    if (absl::Status done = transformer_.Forward({&chunk, 1}, {}); !done.ok()) return done;
    computed_ += count;
  }
  blocks_.Publish(std::span(tokens_).first(computed_));
  return absl::OkStatus();
}

absl::StatusOr<Speculator::Verdict> Speculator::Verify(
    std::span<const std::vector<uint32_t>> drafts) {
  // 1. A table for each branch: the sequence's own for the first, forks for the others.
  forks_.clear();
  for (size_t i = 1; i < drafts.size(); ++i) forks_.push_back(blocks_.Fork(computed_));
  stats_.forks += forks_.size();
  std::vector<std::vector<uint32_t>> inputs;
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < drafts.size(); ++i) {
    std::vector<uint32_t>& input = inputs.emplace_back(1, tokens_.back());
    input.insert(input.end(), drafts[i].begin(), drafts[i].end());
  }
  for (size_t i = 0; i < drafts.size(); ++i) {
    KvBlocks& blocks = i == 0 ? blocks_ : forks_[i - 1];
    blocks.Grow(computed_ + inputs[i].size(), computed_ + inputs[i].size());
    chunks.push_back({.tokens = inputs[i],
                      .position = computed_,
                      .blocks = blocks.table(),
                      .logits = Logits::kAll});
  }
  // 2. One pass computes them all.
  const size_t vocab = transformer_.config().vocab;
  std::vector<float> logits(LogitRows(chunks) * vocab);
  if (absl::Status done = transformer_.Forward(chunks, logits); !done.ok()) return done;
  // 3. Each branch is followed as long as it says what greedy decoding says.
  Verdict best;
  std::span<const float> rows = logits;
  for (uint32_t i = 0; i < drafts.size(); ++i) {
    std::vector<uint32_t> kept;
    for (size_t row = 0; row <= drafts[i].size(); ++row) {
      kept.push_back(Greedy(rows.subspan(row * vocab, vocab)));
      if (row == drafts[i].size() || kept.back() != drafts[i][row]) break;
    }
    rows = rows.subspan(inputs[i].size() * vocab);
    stats_.proposed_tokens += drafts[i].size();
    if (kept.size() > best.tokens.size()) best = {std::move(kept), i};
  }
  return best;
}

absl::Status Speculator::Step(uint32_t tokens_max) {
  LARDER_CHECK(tokens_max > 0);
  if (absl::Status done = Prefill(); !done.ok()) return done;
  SpeculationOptions options = options_;
  options.draft_tokens = std::min(options.draft_tokens, tokens_max - 1);
  std::vector<std::vector<uint32_t>> drafts;
  for (const std::span<const uint32_t> draft : ProposeDrafts(tokens_, options)) {
    drafts.emplace_back(draft.begin(), draft.end());
  }
  if (drafts.empty()) drafts.emplace_back();
  absl::StatusOr<Verdict> verdict = Verify(drafts);
  if (!verdict.ok()) return verdict.status();
  // The branch that went furthest is the sequence from now on, as far as it is right.
  if (verdict->branch > 0) std::swap(blocks_, forks_[verdict->branch - 1]);
  forks_.clear();
  const auto kept = static_cast<uint32_t>(verdict->tokens.size());
  for (const std::vector<uint32_t>& draft : drafts) stats_.truncated_tokens += draft.size() + 1;
  stats_.truncated_tokens -= kept;
  stats_.accepted_tokens += kept - 1;
  ++stats_.passes;
  computed_ += kept;
  blocks_.Truncate(computed_);
  tokens_.insert(tokens_.end(), verdict->tokens.begin(), verdict->tokens.end());
  blocks_.Publish(std::span(tokens_).first(computed_));
  return absl::OkStatus();
}

}  // namespace larder::worker
