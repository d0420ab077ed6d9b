// Speculator: decodes one sequence greedily, several tokens a pass. What comes next is guessed from
// the sequence itself; one forward pass computes the guesses and shows which of them are right.
//
//   sequence   ... it is a truth | universally acknowledged ... it is a truth |
//   draft                          universally acknowledged ...           <- what followed last
//   time pass       [truth universally acknowledged ...]   logits after each of them
//              the longest part of the draft that greedy decoding would have chosen is kept, and
//              the token after it comes for nothing
//
// (Prompt lookup, Saxena 2023; verification as in Leviathan et al. 2023 at temperature 0.)
// With several branches, other drafts are verified in the same pass, each in a fork of the blocks.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. The tokens are those of greedy decoding: a row of logits does not depend on how many tokens
//      a pass computes (transformer.h, invariant 1).
//   2. K/V of a token that was not kept are in no block of the table after Step, except past the
//      end of the last one, and are never published.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/kv_blocks.h"
#include "client/worker/transformer.h"

namespace larder::worker {

struct SpeculationOptions {
  uint32_t draft_tokens = 8;  // of a draft at most; 0: none, one token a pass
  uint32_t branches = 1;      // drafts verified in one pass; 1 or more
  uint32_t match_max = 8;     // tokens by which an earlier place is recognised,
  uint32_t match_min = 3;     // the longest match first
};

struct SpeculationStats {
  uint64_t passes = 0;  // after the prompt's
  uint64_t proposed_tokens = 0;
  uint64_t accepted_tokens = 0;  // of those
  uint64_t forks = 0;
  uint64_t truncated_tokens = 0;  // computed, and dropped again
};

// What followed the last tokens of `tokens` at earlier places, the latest place first: at most
// `branches` drafts that differ in their first token, each of 1 to `draft_tokens` tokens.
std::vector<std::span<const uint32_t>> ProposeDrafts(std::span<const uint32_t> tokens,
                                                     const SpeculationOptions& options);

class Speculator {
 public:
  // `blocks` hold the K/V of the first `computed` tokens of `prompt`, fewer than all. The
  // transformer's rows_max is at least branches * (draft_tokens + 1).
  Speculator(Transformer& transformer, KvBlocks blocks, std::vector<uint32_t> prompt,
             uint32_t computed, const SpeculationOptions& options);

  // One pass: adds 1 to `tokens_max` tokens. The first call computes the prompt before it. Errors
  // are the transformer's.
  absl::Status Step(uint32_t tokens_max);

  // The prompt and what was decoded.
  std::span<const uint32_t> tokens() const { return tokens_; }
  const SpeculationStats& stats() const { return stats_; }
  const KvBlocks& blocks() const { return blocks_; }

 private:
  struct Verdict {
    std::vector<uint32_t> tokens;  // the accepted ones and the one after them
    uint32_t branch = 0;
  };

  absl::Status Prefill();
  // Computes the last token and each draft after it; the best branch's tokens.
  absl::StatusOr<Verdict> Verify(std::span<const std::vector<uint32_t>> drafts);

  Transformer& transformer_;
  const SpeculationOptions options_;
  KvBlocks blocks_;
  std::vector<uint32_t> tokens_;
  uint32_t computed_;            // of these, how many have their K/V
  std::vector<KvBlocks> forks_;  // branch i + 1 of the pass under way
  SpeculationStats stats_;
};

}  // namespace larder::worker
