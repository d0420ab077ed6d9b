// Engine: generates for many requests at once over one Transformer, with the cache or without.
//
//   Submit ─▶ waiting ─▶ lookup ─▶ restoring ─▶ prefilling ─▶ decoding ─▶ Result
//                          └── nothing on NVMe ──┘   └ fork: one sequence a sample
//
// A step is one forward pass: the next token of every decoding sequence, and up to chunk_tokens
// tokens of prompts, oldest request first. Requests join and leave between steps. A prompt is
// looked up when its turn to be computed has come, not when it was submitted: what the requests
// before it published is then there.
//
//   absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Create(*transformer, options);
//   absl::StatusOr<uint64_t> id = (*engine)->Submit({.prompt = tokens});
//   while (!(*engine)->idle()) (*engine)->Step();
//   for (Result& result : (*engine)->TakeResults()) ...
//
// Thread safety: one thread at a time; threads of its own only wait for restores.
//
// Invariants:
//   1. The tokens of a result depend on the request and the model alone: not on the cache, its
//      loss, the other requests or the chunk size. On CUDA that holds but for tokens that are
//      nearly tied (transformer.h, invariant 1).
//   2. No request fails because of the cache. What it does not give is computed; what it does
//      not take is kept in the worker's own pool.
//   3. A request in the batch always has room: it is admitted when the pool could hold all its
//      blocks, even if the cache held none of them.
//   4. A request never waits longer for a restore than what has arrived saves, plus a tenth of
//      computing it all (restore.h; CacheOptions::restore_patience).
//   5. On CUDA no token is chosen from, and nothing published of, blocks of a daemon that is known
//      to be gone: a GPU's memory goes with the process that it belongs to. Such a sequence keeps
//      its tokens and computes their K/V again, in the worker's own pool.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/worker/cache_session.h"
#include "client/worker/request.h"
#include "client/worker/transformer.h"

namespace larder::worker {

struct EngineOptions {
  uint32_t chunk_tokens = 256;              // prompt tokens in a step, over all requests; 1 or more
  uint32_t sequences_max = 8;               // samples computed at a time; 1 or more
  uint64_t pool_bytes = uint64_t{4} << 30;  // own blocks; memory is taken as it is used
  // Nothing: without a cache. A daemon that does not answer is no error.
  std::optional<CacheOptions> cache = std::nullopt;
  // Told about losing and finding the cache; one line without its end.
  std::function<void(std::string_view)> on_notice = nullptr;
};

// Sums since the engine was created.
struct EngineStats {
  uint64_t steps = 0;
  uint64_t prompt_tokens = 0;  // computed in steps
  uint64_t decode_tokens = 0;
  uint64_t sequences_peak = 0;  // most in one step
  absl::Duration computing;     // in Transformer::Forward
};

class Engine {
 public:
  // `transformer` outlives the engine and is used by nobody else meanwhile. With a cache, measures
  // the prefill rate first: three chunks' work. INVALID_ARGUMENT naming the option, its value and
  // the bound; FAILED_PRECONDITION where a daemon answers that has no GPU tier in the memory of the
  // GPU that computes.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(Transformer& transformer,
                                                        EngineOptions options);
  ~Engine();

  // The request's id. INVALID_ARGUMENT naming field, value and bound: a prompt that is empty or
  // fills the context, a token outside the vocabulary, more blocks than the pool has.
  absl::StatusOr<uint64_t> Submit(Request request);

  // No request is waiting or under way.
  bool idle() const;
  // One forward pass, or a wait for the first restore where nothing else can be done. An error
  // is the transformer's, and final.
  absl::Status Step();
  // Steps until idle.
  absl::Status Run();
  // Of the requests that ended since the last call, in the order in which they ended.
  std::vector<Result> TakeResults();

  EngineStats stats() const;
  // Estimated time of prefilling tokens [begin, end) of a prompt alone; zero without a cache.
  absl::Duration PrefillEstimate(uint32_t begin, uint32_t end) const;

 private:
  class Impl;
  explicit Engine(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace larder::worker
