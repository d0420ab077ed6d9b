// Published: a long prefix that was computed once and lies on NVMe, for experiments that bring it
// back.
//
// Thread safety: one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/worker/bench.h"

namespace larder::worker::bench {

class Published {
 public:
  // Loads the model, starts a daemon, lets an engine compute PrefixTokensMax tokens into it, and
  // waits until all is durable.
  static absl::StatusOr<Published> Create(Bench& bench);

  // The first `tokens` of the prefix, and the question that every request asks.
  std::vector<uint32_t> PromptOf(uint32_t tokens) const;
  const std::vector<uint32_t>& prefix() const { return prefix_; }
  Daemon& daemon() { return *daemon_; }
  const Transformer& transformer() const { return *transformer_; }
  absl::Duration publishing_ttft() const { return publishing_ttft_; }

 private:
  explicit Published(Bench& bench) : bench_(&bench) {}

  Bench* bench_;
  Transformer* transformer_ = nullptr;
  std::vector<uint32_t> prefix_;
  std::unique_ptr<Daemon> daemon_;
  absl::Duration publishing_ttft_;
};

}  // namespace larder::worker::bench
