#include "server/daemon.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <optional>
#include <random>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/cache/cache.h"
#include "server/cache/eviction_policy.h"
#include "server/cache_link.h"
#include "server/gpu_tier.h"
#include "server/listen.h"
#include "server/metrics.h"
#include "server/rpc/rpc_server.h"
#include "server/ticker.h"
#include "storage/arena.h"
#include "storage/handover.h"
#include "storage/nvme_store.h"
#include "storage/slab_size.h"
#include "storage/storage_mover.h"
#include "storage/units.h"

namespace larder {
namespace {

// How often the cleaner retries what a full queue refused.
constexpr absl::Duration kCleanPeriod = absl::Milliseconds(100);
// After the drain timeout, what is under way gets this long to notice.
constexpr absl::Duration kStopGrace = absl::Seconds(1);

class SteadyClock final : public Clock {
 public:
  absl::Time Now() const override {
    return absl::UnixEpoch() +
           absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
  }
};

uint64_t Random64() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

absl::Status Annotate(const absl::Status& status, std::string_view key) {
  return absl::Status(status.code(), absl::StrCat(absl::string_view(key.data(), key.size()), ": ",
                                                  status.message()));
}

}  // namespace

// Members in the order in which they are built; each uses only those above it.
class Daemon::Impl {
 public:
  Impl(const Config& config, DaemonHooks hooks) : config_(config), hooks_(std::move(hooks)) {}
  ~Impl();

  absl::Status Start();
  std::string Summary() const;
  void Drain();

 private:
  absl::Status PrepareSocketFiles();
  absl::Status CreateArenas();
  absl::Status CreateGpuTier();
  absl::Status OpenNvme();
  void CreateCache();
  absl::Status Recover();
  absl::Status StartHandover();
  absl::Status StartRpc();
  absl::Status StartMetrics();
  Cache::TierOptions TierOptionsOf(uint64_t bytes) const;
  std::array<TierDescription, kTierCount> DescribeTiers() const;
  std::optional<Sessions::Peer> PeerOf(SessionId session) const;
  std::string GpuSize() const;
  uint32_t ranks() const {
    return gpu_ == nullptr ? 0 : static_cast<uint32_t>(gpu_->arenas().size());
  }

  const Config config_;
  const DaemonHooks hooks_;
  const uint64_t boot_id_ = Random64();
  const SteadyClock clock_;
  CacheLink link_;
  CallStats calls_;
  std::unique_ptr<Arena> host_;
  std::unique_ptr<GpuTier> gpu_;  // null: no such tier
  std::string gpu_missing_;       // why, where one was asked for
  std::unique_ptr<NvmeStore> nvme_;
  std::unique_ptr<StorageMover> mover_;
  std::unique_ptr<Cache> cache_;
  std::unique_ptr<Sessions> sessions_;
  std::unique_ptr<HandoverServer> handover_;
  std::unique_ptr<RpcContext> context_;
  std::unique_ptr<RpcServer> rpc_;
  std::shared_ptr<Metrics> metrics_;
  std::unique_ptr<MetricsServer> metrics_server_;
  std::unique_ptr<Ticker> cleaner_;
};

absl::Status Daemon::Impl::Start() {
  if (absl::Status status = PrepareSocketFiles(); !status.ok()) return status;
  if (absl::Status status = CreateArenas(); !status.ok()) return status;
  if (absl::Status status = OpenNvme(); !status.ok()) return status;
  CreateCache();
  if (absl::Status status = Recover(); !status.ok()) return status;
  if (absl::Status status = StartHandover(); !status.ok()) return status;
  if (absl::Status status = StartRpc(); !status.ok()) return status;
  if (absl::Status status = StartMetrics(); !status.ok()) return status;
  if (nvme_ != nullptr) rpc_->SetNvmeTakesWrites(!nvme_->health().degraded);
  cleaner_ = std::make_unique<Ticker>(kCleanPeriod, [this] {
    cache_->Clean();
    if (nvme_ != nullptr) rpc_->SetNvmeTakesWrites(!nvme_->health().degraded);
  });
  return absl::OkStatus();
}

// First, so that a second daemon on one socket fails before it takes memory.
absl::Status Daemon::Impl::PrepareSocketFiles() {
  for (const std::string& text : config_.listen) {
    const ListenAddress address = *ParseListenAddress(text);
    if (address.kind != ListenAddress::Kind::kUnix) continue;
    if (absl::Status status = PrepareSocketFile(address.name); !status.ok()) {
      return Annotate(status, "listen");
    }
  }
  return absl::OkStatus();
}

absl::Status Daemon::Impl::CreateArenas() {
  const absl::Time start = absl::Now();
  absl::StatusOr<std::unique_ptr<Arena>> host =
      Arena::Create({.name = "larder-host",
                     .bytes = config_.host_bytes,
                     .huge_pages = config_.huge_pages,
                     .prefault_threads = static_cast<int>(config_.prefault_threads)});
  if (!host.ok()) return Annotate(host.status(), "host-bytes");
  host_ = *std::move(host);
  if (absl::Status status = CreateGpuTier(); !status.ok()) return status;
  Log(LogLevel::kInfo, "arenas ready",
      {{"gpu_bytes", gpu_ == nullptr ? 0 : gpu_->bytes()},
       {"gpu_ranks", gpu_ == nullptr ? 0 : gpu_->arenas().size()},
       {"host_bytes", config_.host_bytes},
       {"huge_pages", host_->huge_pages() ? "yes" : "no"},
       {"took_ms", absl::ToInt64Milliseconds(absl::Now() - start)}});
  return absl::OkStatus();
}

// A GPU that is missing, broken or full of others' memory costs its tier, not the daemon; one that
// is too small is a setting to be changed.
absl::Status Daemon::Impl::CreateGpuTier() {
  if (config_.gpu == GpuBackend::kNone) {
    Log(LogLevel::kInfo, "no GPU tier: none asked for, workers read HOST blocks in place");
    return absl::OkStatus();
  }
  GpuTier::Options options;
  options.patience = hooks_.gpu_patience;
  options.on_lost = [this](const absl::Status& why) {
    Log(LogLevel::kError, "gpu lost, its tier is given up until a restart",
        {{"why", std::string(why.message())}});
    link_.LoseGpu();
  };
  absl::StatusOr<std::unique_ptr<GpuTier>> gpu =
      GpuTier::Create(config_, *host_, std::move(options));
  if (gpu.ok()) {
    gpu_ = *std::move(gpu);
    return absl::OkStatus();
  }
  const absl::Status& status = gpu.status();
  if (config_.gpu == GpuBackend::kEmulated || absl::IsResourceExhausted(status) ||
      absl::IsInvalidArgument(status)) {
    return Annotate(status, "gpu-bytes");
  }
  gpu_missing_ = std::string(status.message());
  Log(LogLevel::kError, "no GPU tier: the device is missing, broken or full, running without",
      {{"why", gpu_missing_}});
  return absl::OkStatus();
}

absl::Status Daemon::Impl::OpenNvme() {
  if (config_.nvme_dir.empty()) return absl::OkStatus();
  NvmeStore::Options options;
  options.directory = config_.nvme_dir;
  options.bytes = config_.nvme_bytes;
  options.slab_bytes = SlabSize(config_.nvme_bytes);
  options.memory = {host_->base(), host_->bytes()};
  options.io_threads = static_cast<int>(config_.nvme_threads);
  options.wrap_io = hooks_.wrap_nvme_io;
  options.on_writable = [this](bool writable) {
    Log(writable ? LogLevel::kInfo : LogLevel::kError,
        writable ? "nvme takes writes again" : "nvme degraded, writes stopped");
    link_.SetNvmeWritable(writable);
  };
  absl::StatusOr<std::unique_ptr<NvmeStore>> store = NvmeStore::Open(std::move(options));
  if (!store.ok()) return Annotate(store.status(), "nvme-dir");
  nvme_ = *std::move(store);
  Log(LogLevel::kInfo, "nvme opened", {{"dir", config_.nvme_dir}, {"io", nvme_->io()}});
  return absl::OkStatus();
}

Cache::TierOptions Daemon::Impl::TierOptionsOf(uint64_t bytes) const {
  return {.bytes = bytes,
          .slab_bytes = SlabSize(bytes),
          .free_bytes_low_water =
              static_cast<uint64_t>(static_cast<double>(bytes) * config_.low_water)};
}

void Daemon::Impl::CreateCache() {
  StorageMover::Options moves;
  if (gpu_ != nullptr) {
    for (const auto& arena : gpu_->arenas()) moves.gpus.push_back(arena.get());
    moves.copier = gpu_->copier();
  }
  moves.host = host_.get();
  moves.nvme = nvme_.get();
  moves.copy_threads = static_cast<int>(config_.copy_threads);
  mover_ = std::make_unique<StorageMover>(
      moves, [this](MoveId id, absl::Status status) { link_.OnMoveDone(id, std::move(status)); });

  Cache::Options options;
  options.tiers[Index(Tier::kGpu)] = TierOptionsOf(gpu_ == nullptr ? 0 : gpu_->bytes());
  if (gpu_ != nullptr) options.gpu_ranks = ranks();
  options.tiers[Index(Tier::kHost)] = TierOptionsOf(host_->bytes());
  options.tiers[Index(Tier::kNvme)] = TierOptionsOf(nvme_ == nullptr ? 0 : nvme_->bytes());
  if (nvme_ != nullptr) options.tiers[Index(Tier::kNvme)].slab_bytes = nvme_->slab_bytes();
  options.nvme_writes = {.bytes_per_second = config_.nvme_write_limit,
                         .bytes_per_day = config_.nvme_write_limit_day};
  options.first_id = (Random64() >> 24) + 1;  // leaves room to count up from
  options.models_max = config_.models_max;
  options.sessions_max = config_.sessions_max;
  cache_ = std::make_unique<Cache>(options, clock_, *mover_, MakeLruPolicy());
  link_.Connect(cache_.get());
  if (nvme_ != nullptr && nvme_->health().degraded) cache_->SetNvmeWritable(false);
  if (gpu_ != nullptr && !gpu_->health().ok()) cache_->LoseGpu();
}

absl::Status Daemon::Impl::Recover() {
  if (nvme_ == nullptr) return absl::OkStatus();
  const absl::Time start = absl::Now();
  uint64_t kept = 0;
  uint64_t dropped = 0;
  const absl::Status status =
      nvme_->Scan([&](Slot slot, uint32_t bytes, const BlockRecord& record) {
        const bool keep = cache_->RecoverBlock(slot, bytes, record);
        ++(keep ? kept : dropped);
        return keep;
      });
  if (!status.ok()) return Annotate(status, "nvme-dir");
  const uint64_t orphans = cache_->RecoverDone();
  cache_->RecoverWritten(nvme_->written());
  Log(LogLevel::kInfo, "nvme recovered",
      {{"dir", config_.nvme_dir},
       {"blocks", kept - orphans},
       {"dropped", dropped},
       {"orphans", orphans},
       {"took_ms", absl::ToInt64Milliseconds(absl::Now() - start)}});
  return absl::OkStatus();
}

absl::Status Daemon::Impl::StartHandover() {
  sessions_ = std::make_unique<Sessions>(*cache_, [this](SessionId id) { return PeerOf(id); });
  HandoverServer::Options options;
  options.socket_path = config_.handover_socket;
  options.mode = config_.socket_mode;
  options.boot_id = boot_id_;
  const auto add = [&options](Tier tier, uint32_t number, uint32_t rank, const Arena& arena) {
    HandoverServer::ArenaExport exported{arena.Description(), arena.fd()};
    exported.description.arena = number;
    exported.description.tier = static_cast<uint32_t>(Index(tier)) + 1;
    exported.description.rank = rank;
    options.arenas.push_back(exported);
  };
  for (uint32_t rank = 0; rank < ranks(); ++rank) {
    add(Tier::kGpu, rank, rank, *gpu_->arenas()[rank]);
  }
  add(Tier::kHost, wire::kHostArena, 0, *host_);
  // One for each process of a session's group.
  options.connections_max = static_cast<int>(config_.sessions_max * config_.gpu_ranks);
  absl::StatusOr<std::unique_ptr<HandoverServer>> server = HandoverServer::Start(
      std::move(options), [this](uint64_t session) { return sessions_->IsLive(session); },
      [this](uint64_t session) { sessions_->ProcessGone(session); });
  if (!server.ok()) return Annotate(server.status(), "handover-socket");
  handover_ = *std::move(server);
  return absl::OkStatus();
}

std::optional<Sessions::Peer> Daemon::Impl::PeerOf(SessionId session) const {
  const std::optional<HandoverServer::Peer> peer = handover_->PeerOf(session);
  if (!peer) return std::nullopt;
  return Sessions::Peer{.pid = peer->pid, .foreign = peer->foreign};
}

absl::Status Daemon::Impl::StartRpc() {
  context_ = std::unique_ptr<RpcContext>(new RpcContext{.cache = *cache_,
                                                        .sessions = *sessions_,
                                                        .calls = calls_,
                                                        .boot_id = boot_id_,
                                                        .handover_socket = config_.handover_socket,
                                                        .version = LARDER_VERSION,
                                                        .started = absl::Now(),
                                                        .gpus = {},
                                                        .host = host_->host_bytes(),
                                                        .read_gpu = nullptr,
                                                        .describe_tiers = nullptr});
  if (gpu_ != nullptr && gpu_->copier() == nullptr) {
    for (const auto& arena : gpu_->arenas()) context_->gpus.push_back(arena->host_bytes());
  } else if (gpu_ != nullptr) {
    context_->read_gpu = [this](uint32_t rank, uint64_t offset, std::span<std::byte> to,
                                Copier::DoneFn done) {
      gpu_->reader()->Read(rank, gpu_->arenas()[rank]->base() + offset, to, std::move(done));
    };
  }
  context_->describe_tiers = [this] { return DescribeTiers(); };

  // Made with its final mode, so that nobody else gets in between bind and chmod.
  const mode_t before = ::umask(0777 & ~config_.socket_mode);
  absl::StatusOr<std::unique_ptr<RpcServer>> server = RpcServer::Start(*context_, config_.listen);
  ::umask(before);
  if (!server.ok()) return server.status();
  rpc_ = *std::move(server);
  return absl::OkStatus();
}

absl::Status Daemon::Impl::StartMetrics() {
  if (config_.metrics.empty()) return absl::OkStatus();
  metrics_ = std::make_shared<Metrics>(*cache_, calls_, nvme_.get(), LARDER_VERSION);
  absl::StatusOr<std::unique_ptr<MetricsServer>> server =
      MetricsServer::Start(config_.metrics, metrics_);
  if (!server.ok()) return server.status();
  metrics_server_ = *std::move(server);
  Log(LogLevel::kInfo, "metrics served", {{"url", metrics_server_->url()}});
  return absl::OkStatus();
}

std::array<TierDescription, kTierCount> Daemon::Impl::DescribeTiers() const {
  std::array<TierDescription, kTierCount> tiers;
  TierDescription& gpu = tiers[Index(Tier::kGpu)];
  if (gpu_ != nullptr) {
    const absl::Status health = gpu_->health();
    gpu = {gpu_->backend(),
           health.ok() ? "OK" : absl::StrCat("DEGRADED: lost until a restart: ", health.message()),
           "", ranks()};
  } else if (!gpu_missing_.empty()) {
    gpu.health = absl::StrCat("ABSENT: ", gpu_missing_);
  }
  tiers[Index(Tier::kHost)] = {"memfd", "OK"};
  if (nvme_ != nullptr) {
    const NvmeStore::Health health = nvme_->health();
    tiers[Index(Tier::kNvme)] = {
        "file", health.degraded ? absl::StrCat("DEGRADED: ", health.why) : "OK", nvme_->io()};
  }
  return tiers;
}

// "64 MiB", or of several ranks "4 x 64 MiB".
std::string Daemon::Impl::GpuSize() const {
  const std::string each = FormatBytes(gpu_->bytes());
  return ranks() == 1 ? each : absl::StrCat(ranks(), " x ", each);
}

std::string Daemon::Impl::Summary() const {
  std::string text;
  for (size_t i = 0; i < config_.listen.size(); ++i) {
    const ListenAddress address = *ParseListenAddress(config_.listen[i]);
    const bool tcp = address.kind == ListenAddress::Kind::kTcp;
    const std::string& given = config_.listen[i];
    absl::StrAppend(
        &text, i == 0 ? "" : ", ",
        tcp ? absl::StrCat(given.substr(0, given.rfind(':') + 1), rpc_->ports()[i]) : given);
  }
  absl::StrAppend(&text, " (GPU ",
                  gpu_ != nullptr
                      ? absl::StrCat(gpu_->backend(), " ", GpuSize())
                      : absl::StrCat("none", gpu_missing_.empty() ? "" : ": ", gpu_missing_),
                  ", HOST ", FormatBytes(host_->bytes()), ", NVME ",
                  nvme_ == nullptr ? "none" : FormatBytes(nvme_->bytes()), ")");
  return text;
}

void Daemon::Impl::Drain() {
  const absl::Time deadline = absl::Now() + config_.drain_timeout;
  rpc_->Drain(config_.drain_timeout);
  const bool left = sessions_->AwaitNoStreams(deadline);
  // Once the workers have left, what is still connected only watches.
  const absl::Time grace_end = absl::Now() + kStopGrace;
  const int cut_off = rpc_->Stop(left ? grace_end : std::max(deadline, grace_end));
  cleaner_.reset();
  const bool moved = mover_->Drain(std::max(deadline, absl::Now() + kStopGrace));
  Log(left && moved && cut_off == 0 ? LogLevel::kInfo : LogLevel::kWarning, "drained",
      {{"workers", left ? "all left" : "cut off at the drain timeout"},
       {"moves", moved ? "all finished" : "abandoned at the drain timeout"},
       {"connections_cut_off", cut_off}});
}

Daemon::Impl::~Impl() {
  cleaner_.reset();
  metrics_server_.reset();
  rpc_.reset();
  if (gpu_ != nullptr && gpu_->reader() != nullptr) gpu_->reader()->Stop();
  if (gpu_ != nullptr && handover_ != nullptr && handover_->AnyHolder()) gpu_->LeaveToProcessEnd();
  handover_.reset();
  link_.Disconnect();
}

Daemon::Daemon(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Daemon::~Daemon() = default;

absl::StatusOr<std::unique_ptr<Daemon>> Daemon::Start(const Config& config, DaemonHooks hooks) {
  auto impl = std::make_unique<Impl>(config, std::move(hooks));
  if (absl::Status status = impl->Start(); !status.ok()) return status;
  return std::unique_ptr<Daemon>(new Daemon(std::move(impl)));
}

std::string Daemon::Summary() const { return impl_->Summary(); }
void Daemon::Drain() { impl_->Drain(); }

}  // namespace larder
