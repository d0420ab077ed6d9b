#include "test_server.h"

#include <chrono>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/time/clock.h"
#include "server/cache/eviction_policy.h"

namespace larder {
namespace {

constexpr uint64_t kGpuRanks = 2;
constexpr uint64_t kGpuBlocks = 8;
constexpr uint64_t kHostBlocks = 32;
constexpr uint64_t kNvmeBlocks = 64;

class SteadyClock final : public Clock {
 public:
  absl::Time Now() const override { return absl::Now(); }
};

Cache::Options CacheOptions(bool nvme) {
  Cache::Options options;
  const auto tier = [](uint64_t blocks) {
    return Cache::TierOptions{.bytes = blocks * kBlockBytes,
                              .slab_bytes = blocks * kBlockBytes / 2};
  };
  options.tiers[Index(Tier::kGpu)] = tier(kGpuBlocks);
  options.tiers[Index(Tier::kHost)] = tier(kHostBlocks);
  if (nvme) options.tiers[Index(Tier::kNvme)] = tier(kNvmeBlocks);
  options.gpu_ranks = kGpuRanks;
  options.first_id = 1000;
  return options;
}

}  // namespace

v1::ModelSpec SmallSpec(const std::string& name) {
  v1::ModelSpec spec;
  spec.set_name(name);
  spec.set_layers(1);
  spec.set_kv_heads(1);
  spec.set_head_dim(32);
  spec.set_dtype(v1::DTYPE_F32);
  spec.set_block_tokens(kBlockTokens);
  return spec;
}

std::vector<uint32_t> Tokens(uint32_t blocks, uint32_t seed) {
  std::vector<uint32_t> tokens(blocks * kBlockTokens);
  std::iota(tokens.begin(), tokens.end(), seed * 1'000'000);
  return tokens;
}

std::string BlockData(uint32_t blocks, uint32_t seed, uint32_t position) {
  std::string data;
  for (uint32_t i = 0; i < blocks; ++i) {
    data.append(kBlockBytes, static_cast<char>(seed * 31 + position + i + 1));
  }
  return data;
}

TestServer::TestServer(bool nvme)
    : memory_((kGpuRanks * kGpuBlocks + kHostBlocks) * kBlockBytes) {
  std::vector<std::span<std::byte>> gpus;
  for (uint64_t rank = 0; rank < kGpuRanks; ++rank) {
    gpus.push_back(std::span(memory_).subspan(rank * kGpuBlocks * kBlockBytes,
                                              kGpuBlocks * kBlockBytes));
  }
  const auto host = std::span(memory_).subspan(kGpuRanks * kGpuBlocks * kBlockBytes);
  clock_ = std::make_unique<SteadyClock>();
  mover_ = std::make_unique<TestMover>(gpus, host, link_);
  cache_ = std::make_unique<Cache>(CacheOptions(nvme), *clock_, *mover_, MakeLruPolicy());
  link_.Connect(cache_.get());
  sessions_ = std::make_unique<Sessions>(*cache_, [this](SessionId id) { return PeerOf(id); });
  context_ = std::unique_ptr<RpcContext>(new RpcContext{.cache = *cache_,
                                                        .sessions = *sessions_,
                                                        .calls = calls_,
                                                        .boot_id = 77,
                                                        .inline_bytes_max = 68 * kBlockBytes,
                                                        .handover_socket = "/test.handover",
                                                        .version = "test",
                                                        .started = absl::Now(),
                                                        .gpus = gpus,
                                                        .host = host,
                                                        .read_gpu = nullptr,
                                                        .describe_tiers = nullptr});
  context_->describe_tiers = [] { return std::array<TierDescription, kTierCount>{}; };
  auto rpc = RpcServer::Start(*context_, {});
  EXPECT_TRUE(rpc.ok()) << rpc.status();
  rpc_ = *std::move(rpc);
  channel_ = rpc_->InProcessChannel();
  kv_ = v1::KvCache::NewStub(channel_);
  inspector_ = v1::Inspector::NewStub(channel_);
}

TestServer::~TestServer() {
  mover_->Pause(false);
  kv_.reset();
  inspector_.reset();
  channel_.reset();
  rpc_.reset();
  mover_->AwaitIdle();
  cache_->CheckInvariants();
  link_.Disconnect();
}

void TestServer::Map(SessionId session, int64_t pid) {
  absl::MutexLock lock(&mu_);
  pids_[session] = pid;
}

void TestServer::Unmap(SessionId session) {
  {
    absl::MutexLock lock(&mu_);
    pids_.erase(session);
  }
  sessions_->ProcessGone(session);
}

std::optional<Sessions::Peer> TestServer::PeerOf(SessionId session) {
  absl::MutexLock lock(&mu_);
  const auto it = pids_.find(session);
  if (it == pids_.end()) return std::nullopt;
  return Sessions::Peer{.pid = it->second};
}

TestWorker::TestWorker(TestServer& server, const std::string& name) : server_(server) {
  v1::AttachRequest request;
  request.set_worker(name);
  stream_ = server.kv().Attach(&context_, request);
  EXPECT_TRUE(stream_->Read(&attached_));
  session_ = attached_.attached().session_id();
}

TestWorker::~TestWorker() {
  if (stream_ != nullptr) Detach();
}

std::optional<v1::AttachEvent> TestWorker::Next() {
  v1::AttachEvent event;
  if (!stream_->Read(&event)) return std::nullopt;
  return event;
}

grpc::Status TestWorker::Detach() {
  context_.TryCancel();
  v1::AttachEvent event;
  while (stream_->Read(&event)) {
  }
  const grpc::Status status = stream_->Finish();
  stream_.reset();
  return status;
}

uint64_t TestWorker::Lookup(uint64_t model, const std::vector<uint32_t>& tokens,
                            uint32_t* matched) {
  grpc::ClientContext context;
  v1::LookupPrefixRequest request;
  v1::LookupPrefixResponse response;
  request.set_session_id(session_);
  request.set_model_id(model);
  request.mutable_tokens()->Add(tokens.begin(), tokens.end());
  const grpc::Status status = server_.kv().LookupPrefix(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  if (matched != nullptr) *matched = response.matched_tokens();
  return response.lease_id();
}

v1::ReserveResponse TestWorker::Reserve(uint64_t lease, uint32_t position, uint32_t count,
                                        v1::Tier tier) {
  grpc::ClientContext context;
  v1::ReserveRequest request;
  v1::ReserveResponse response;
  request.set_session_id(session_);
  request.set_lease_id(lease);
  request.set_position(position);
  request.set_count(count);
  request.set_tier(tier);
  const grpc::Status status = server_.kv().Reserve(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response;
}

v1::LeaseState TestWorker::Put(uint64_t lease, uint32_t position,
                               const std::vector<uint32_t>& tokens) {
  grpc::ClientContext context;
  v1::PutRequest request;
  v1::LeaseState response;
  request.set_session_id(session_);
  request.set_lease_id(lease);
  request.set_position(position);
  request.mutable_tokens()->Add(tokens.begin(), tokens.end());
  const grpc::Status status = server_.kv().Put(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response;
}

void TestWorker::Release(uint64_t lease) {
  grpc::ClientContext context;
  v1::ReleaseRequest request;
  v1::ReleaseResponse response;
  request.set_session_id(session_);
  request.set_lease_id(lease);
  const grpc::Status status = server_.kv().Release(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
}

uint64_t TestWorker::Publish(uint64_t model, uint32_t blocks, uint32_t seed, v1::Tier tier) {
  const uint64_t lease = Lookup(model, Tokens(blocks, seed));
  const v1::ReserveResponse reserved = Reserve(lease, 0, blocks, tier);
  for (const v1::Run& run : reserved.runs()) {
    for (int i = 0; i < run.offsets_size(); ++i) {
      std::memcpy(server_.At(run, i), BlockData(1, seed, run.position() + i).data(), kBlockBytes);
    }
  }
  Put(lease, 0, Tokens(blocks, seed));
  return lease;
}

uint64_t OpenSmallModel(TestServer& server, const std::string& name) {
  grpc::ClientContext context;
  v1::OpenModelRequest request;
  v1::Model model;
  *request.mutable_spec() = SmallSpec(name);
  const grpc::Status status = server.kv().OpenModel(&context, request, &model);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return model.model_id();
}

}  // namespace larder
