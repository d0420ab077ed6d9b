#include "server/metrics.h"

#include <netdb.h>
#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <sys/socket.h>

#include <exception>
#include <limits>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/notification.h"
#include "storage/unique_fd.h"

namespace larder {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

// Builds families one after the other.
class Families {
 public:
  void Start(const char* name, MetricType type, const char* help) {
    families_.push_back(MetricFamily{name, help, type, {}});
  }
  void Add(Labels labels, double value) {
    ClientMetric metric;
    metric.label = std::move(labels);
    if (families_.back().type == MetricType::Counter) {
      metric.counter.value = value;
    } else {
      metric.gauge.value = value;
    }
    families_.back().metric.push_back(std::move(metric));
  }
  void Add(ClientMetric metric) { families_.back().metric.push_back(std::move(metric)); }
  void Counter(const char* name, const char* help, double value) {
    Start(name, MetricType::Counter, help);
    Add({}, value);
  }
  void Gauge(const char* name, const char* help, double value) {
    Start(name, MetricType::Gauge, help);
    Add({}, value);
  }
  std::vector<MetricFamily> Take() { return std::move(families_); }

 private:
  std::vector<MetricFamily> families_;
};

std::string Lower(Tier tier) {
  const std::string_view name = TierName(tier);
  return absl::AsciiStrToLower(absl::string_view(name.data(), name.size()));
}

void AddTiers(const CacheStats& stats, Families& out) {
  out.Start("larder_tier_bytes", MetricType::Gauge,
            "Bytes of a tier, of GPU in each rank: total, used by blocks, pinned by leases");
  for (const Tier tier : kTiers) {
    const TierStats& from = stats.tiers[Index(tier)];
    out.Add({{"tier", Lower(tier)}, {"state", "total"}}, from.bytes_total);
    out.Add({{"tier", Lower(tier)}, {"state", "used"}}, from.bytes_used);
    out.Add({{"tier", Lower(tier)}, {"state", "pinned"}}, from.bytes_pinned);
  }
  const auto each = [&](const char* name, MetricType type, const char* help,
                        uint64_t TierStats::*field) {
    out.Start(name, type, help);
    for (const Tier tier : kTiers)
      out.Add({{"tier", Lower(tier)}}, stats.tiers[Index(tier)].*field);
  };
  each("larder_tier_blocks", MetricType::Gauge, "Published blocks with a copy in a tier",
       &TierStats::blocks);
  each("larder_tier_hits_total", MetricType::Counter, "Blocks served from a tier",
       &TierStats::hits);
  each("larder_tier_evictions_total", MetricType::Counter, "Copies dropped from a tier",
       &TierStats::evictions);
}

void AddMoves(const CacheStats& stats, Families& out) {
  const auto labels = [](const HopStats& hop) {
    return Labels{{"from", Lower(hop.from)}, {"to", Lower(hop.to)}};
  };
  out.Start("larder_moves_total", MetricType::Counter, "Moves that ended, by their result");
  for (const HopStats& hop : stats.hops) {
    Labels done = labels(hop);
    Labels failed = done;
    done.push_back({"result", "done"});
    failed.push_back({"result", "failed"});
    out.Add(std::move(done), hop.done);
    out.Add(std::move(failed), hop.failed);
  }
  out.Start("larder_move_bytes_total", MetricType::Counter, "Bytes copied between tiers");
  for (const HopStats& hop : stats.hops) out.Add(labels(hop), hop.bytes);
  out.Start("larder_moves_queued", MetricType::Gauge, "Moves that have not ended");
  for (const HopStats& hop : stats.hops) out.Add(labels(hop), hop.queued);
  out.Start("larder_move_bytes_per_second", MetricType::Gauge, "Measured rate of a hop, smoothed");
  for (const HopStats& hop : stats.hops) out.Add(labels(hop), hop.bytes_per_second);
}

void AddCache(const CacheStats& stats, Families& out) {
  out.Counter("larder_lookups_total", "Lookups of prefixes", stats.lookups);
  out.Start("larder_lookup_blocks_total", MetricType::Counter, "Blocks asked for by lookups");
  out.Add({{"result", "hit"}}, stats.lookup_blocks - stats.miss_blocks);
  out.Add({{"result", "miss"}}, stats.miss_blocks);
  out.Start("larder_put_blocks_total", MetricType::Counter, "Blocks published by workers");
  out.Add({{"result", "new"}}, stats.put_blocks - stats.duplicate_blocks);
  out.Add({{"result", "duplicate"}}, stats.duplicate_blocks);
  out.Start("larder_sessions", MetricType::Gauge,
            "Sessions: live, or lost and waiting for their process to go");
  out.Add({{"state", "live"}}, stats.sessions);
  out.Add({{"state", "lost"}}, stats.sessions_lost);
  out.Gauge("larder_models", "Open models", stats.models);
  out.Gauge("larder_leases", "Leases held", stats.leases);
  out.Gauge("larder_reserved_blocks", "Blocks reserved and not published", stats.reserved_blocks);
  out.Gauge("larder_moves_in_flight", "Moves under way or queued", stats.moves_in_flight);
  out.Counter("larder_exhausted_total", "Calls refused because everything was pinned",
              stats.exhausted);
  out.Counter("larder_corrupt_blocks_total", "Blocks whose checksum or key did not match",
              stats.corrupt_blocks);
  out.Counter("larder_nvme_limited_blocks_total",
              "Blocks forgotten unwritten because the NVME write limit was reached",
              stats.limited_blocks);
  out.Counter("larder_orphans_collected_total", "Blocks dropped because an ancestor was missing",
              stats.orphans_collected);
}

void AddNvme(const NvmeStore& nvme, Families& out) {
  const NvmeStore::Stats stats = nvme.stats();
  out.Gauge("larder_nvme_degraded", "1 while the NVME tier refuses writes",
            nvme.health().degraded ? 1 : 0);
  out.Start("larder_nvme_operations_total", MetricType::Counter, "Reads, writes and group syncs");
  out.Add({{"operation", "read"}}, stats.reads);
  out.Add({{"operation", "write"}}, stats.writes);
  out.Add({{"operation", "sync"}}, stats.syncs);
  out.Start("larder_nvme_bytes_total", MetricType::Counter, "Payload bytes read and written");
  out.Add({{"operation", "read"}}, stats.read_bytes);
  out.Add({{"operation", "write"}}, stats.written_bytes);
  out.Counter("larder_nvme_errors_total", "Errors of the device or its index", stats.errors);
}

ClientMetric Histogram(std::string_view method, const CallStats::Snapshot& calls) {
  ClientMetric metric;
  metric.label = {{"method", std::string(method)}};
  uint64_t count = 0;
  for (int i = 0; i < CallStats::kBucketCount; ++i) {
    count += calls.by_bucket[i];
    const bool last = i + 1 == CallStats::kBucketCount;
    metric.histogram.bucket.push_back(
        {count, last ? std::numeric_limits<double>::infinity() : CallStats::kBucketSeconds[i]});
  }
  metric.histogram.sample_count = count;
  metric.histogram.sample_sum = calls.seconds;
  return metric;
}

void AddCalls(const CallStats& stats, Families& out) {
  out.Start("larder_calls_total", MetricType::Counter, "gRPC calls that ended, by their code");
  for (int m = 0; m < kMethodCount; ++m) {
    const CallStats::Snapshot calls = stats.Read(static_cast<Method>(m));
    const std::string name(MethodName(static_cast<Method>(m)));
    for (int code = 0; code < CallStats::kCodeCount; ++code) {
      if (calls.by_code[code] == 0 && code != 0) continue;
      out.Add({{"method", name},
               {"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}},
              calls.by_code[code]);
    }
  }
  out.Start("larder_call_seconds", MetricType::Histogram,
            "How long gRPC calls took in the daemon; streams count with their whole life");
  for (int m = 0; m < kMethodCount; ++m) {
    const auto method = static_cast<Method>(m);
    const CallStats::Snapshot calls = stats.Read(method);
    out.Add(Histogram(MethodName(method), calls));
  }
}

// A connection that asks for nothing has one of these threads to itself, until it is closed.
constexpr const char* kThreads = "4";
constexpr const char* kRequestTimeoutMs = "2000";

constexpr absl::Duration kPokeInterval = absl::Milliseconds(5);

// Begins to connect, and leaves it at that.
void Poke(absl::string_view host, int port) {
  if (absl::ConsumePrefix(&host, "[")) absl::ConsumeSuffix(&host, "]");
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(std::string(host).c_str(), std::to_string(port).c_str(), &hints, &found) != 0) {
    return;
  }
  const UniqueFd fd(::socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  static_cast<void>(::connect(fd.get(), found->ai_addr, found->ai_addrlen));
  ::freeaddrinfo(found);
}

}  // namespace

std::vector<MetricFamily> Metrics::Collect() const {
  Families out;
  out.Start("larder_build_info", MetricType::Gauge, "Always 1; the version is a label");
  out.Add({{"version", version_}}, 1);
  const CacheStats stats = cache_.Stats();
  AddTiers(stats, out);
  AddMoves(stats, out);
  AddCache(stats, out);
  if (nvme_ != nullptr) AddNvme(*nvme_, out);
  AddCalls(calls_, out);
  return out.Take();
}

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(
    const std::string& address, std::shared_ptr<Metrics> metrics) {
  try {
    auto exposer = std::make_unique<prometheus::Exposer>(
        std::vector<std::string>{"listening_ports", address, "num_threads", kThreads,
                                 "request_timeout_ms", kRequestTimeoutMs});
    exposer->RegisterCollectable(metrics);
    const std::vector<int> ports = exposer->GetListeningPorts();
    const std::string host = address.substr(0, address.rfind(':'));
    return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(exposer), std::move(metrics),
                                                            host, ports.empty() ? 0 : ports[0]));
  } catch (const std::exception& error) {
    return absl::UnavailableError(
        absl::StrCat("metrics: ", address, " could not be bound (", error.what(), ")"));
  }
}

MetricsServer::MetricsServer(std::unique_ptr<prometheus::Exposer> exposer,
                             std::shared_ptr<Metrics> metrics, std::string host, int port)
    : metrics_(std::move(metrics)),
      exposer_(std::move(exposer)),
      host_(std::move(host)),
      port_(port) {}

std::string MetricsServer::url() const {
  return absl::StrCat("http://", host_, ":", port_, "/metrics");
}

// The exposer's thread looks whether it is to stop when somebody connects, or every two
// seconds: so somebody connects, until it has.
MetricsServer::~MetricsServer() {
  absl::Notification stopped;
  std::thread stop([&] {
    exposer_.reset();
    stopped.Notify();
  });
  while (!stopped.WaitForNotificationWithTimeout(kPokeInterval)) Poke(host_, port_);
  stop.join();
}

}  // namespace larder
