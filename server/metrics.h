// Metrics: everything that Prometheus may ask, read when it asks.
//
// Thread safety: thread-safe; Collect runs on the exposer's threads.
//
// Invariants:
//   1. Nothing is counted here: numbers come from the cache, the NVME store and the calls, and
//      are as exact as those.
#pragma once

#include <prometheus/collectable.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "server/cache/cache.h"
#include "server/rpc/call_stats.h"
#include "storage/nvme_store.h"

namespace prometheus {
class Exposer;
}

namespace larder {

class Metrics final : public prometheus::Collectable {
 public:
  // What it reads outlives it; `nvme` is null without that tier.
  Metrics(const Cache& cache, const CallStats& calls, const NvmeStore* nvme, std::string version)
      : cache_(cache), calls_(calls), nvme_(nvme), version_(std::move(version)) {}

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const Cache& cache_;
  const CallStats& calls_;
  const NvmeStore* const nvme_;
  const std::string version_;
};

// Serves metrics over HTTP as long as it lives.
class MetricsServer {
 public:
  // UNAVAILABLE when the address cannot be had.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& address,
                                                              std::shared_ptr<Metrics> metrics);
  ~MetricsServer();
  std::string url() const;

 private:
  MetricsServer(std::unique_ptr<prometheus::Exposer> exposer, std::shared_ptr<Metrics> metrics,
                std::string host, int port);

  const std::shared_ptr<Metrics> metrics_;
  std::unique_ptr<prometheus::Exposer> exposer_;
  const std::string host_;
  const int port_;
};

}  // namespace larder
