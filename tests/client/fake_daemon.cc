#include "fake_daemon.h"

#include <chrono>
#include <cstdio>
#include <utility>

namespace larder {
namespace {

constexpr uint32_t kHostArena = 1;  // Run.arena
constexpr uint32_t kGpuArena = 4;   // of rank 0
constexpr absl::Duration kPollInterval = absl::Milliseconds(5);

std::unique_ptr<Arena> MakeArena() {
  absl::StatusOr<std::unique_ptr<Arena>> arena =
      Arena::Create({.name = "fake", .bytes = FakeDaemon::kArenaBytes, .huge_pages = false});
  return arena.ok() ? *std::move(arena) : nullptr;
}

HandoverServer::Options HandoverOptions(const std::string& path, uint64_t boot_id,
                                        const Arena& host,
                                        const std::array<std::unique_ptr<Arena>, 2>& gpus) {
  HandoverServer::Options options;
  options.socket_path = path;
  options.boot_id = boot_id;
  const auto add = [&](uint32_t number, v1::Tier tier, uint32_t rank, const Arena& arena) {
    HandoverServer::ArenaExport exported;
    exported.description.arena = number;
    exported.description.tier = tier;
    exported.description.kind = wire::kMemfd;
    exported.description.rank = rank;
    exported.description.bytes = arena.bytes();
    exported.fd = arena.fd();
    options.arenas.push_back(exported);
  };
  add(kHostArena, v1::TIER_HOST, 0, host);
  for (uint32_t rank = 0; rank < gpus.size(); ++rank) {
    add(kGpuArena + rank, v1::TIER_GPU, rank, *gpus[rank]);
  }
  return options;
}

}  // namespace

FakeDaemon::FakeDaemon(const std::string& directory, uint64_t boot_id)
    : boot_id_(boot_id),
      handover_path_(directory + "/handover.sock"),
      address_("unix:" + directory + "/larderd.sock"),
      arena_(MakeArena()),
      gpus_({MakeArena(), MakeArena()}),
      next_session_(boot_id * 1000) {
  absl::StatusOr<std::unique_ptr<HandoverServer>> handover = HandoverServer::Start(
      HandoverOptions(handover_path_, boot_id, *arena_, gpus_),
      [this](uint64_t session_id) {
        absl::MutexLock lock(&mutex_);
        return sessions_.contains(session_id);
      },
      [](uint64_t) {});
  if (handover.ok()) handover_ = *std::move(handover);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address_, grpc::InsecureServerCredentials());
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
}

FakeDaemon::~FakeDaemon() {
  if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
}

v1::Model FakeDaemon::Model() {
  v1::Model model;
  model.set_model_id(kModelId);
  model.set_block_bytes(kBlockBytes);
  model.set_block_tokens(kBlockTokens);
  return model;
}

v1::Run FakeDaemon::GpuRun(uint32_t position, const std::vector<uint64_t>& offsets) {
  v1::Run run = HostRun(position, offsets);
  run.set_tier(v1::TIER_GPU);
  run.set_arena(kGpuArena);
  return run;
}

v1::Run FakeDaemon::HostRun(uint32_t position, const std::vector<uint64_t>& offsets) {
  v1::Run run;
  run.set_tier(v1::TIER_HOST);
  run.set_arena(kHostArena);
  run.set_position(position);
  run.set_blocks(static_cast<uint32_t>(offsets.size()));
  run.mutable_offsets()->Add(offsets.begin(), offsets.end());
  return run;
}

void FakeDaemon::CutStreams() {
  absl::MutexLock lock(&mutex_);
  ++cuts_;
}

void FakeDaemon::Drain() {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
}

void FakeDaemon::HangCalls() {
  absl::MutexLock lock(&mutex_);
  hanging_ = true;
}

void FakeDaemon::ResumeCalls() {
  absl::MutexLock lock(&mutex_);
  hanging_ = false;
}

void FakeDaemon::AnswerLookup(v1::LookupPrefixResponse answer) {
  absl::MutexLock lock(&mutex_);
  lookup_ = std::move(answer);
}

void FakeDaemon::AnswerReserve(v1::ReserveResponse answer) {
  absl::MutexLock lock(&mutex_);
  reserve_ = std::move(answer);
}

void FakeDaemon::AnswerState(v1::LeaseState answer) {
  absl::MutexLock lock(&mutex_);
  state_ = std::move(answer);
}

void FakeDaemon::AnswerPrefetch(std::vector<v1::PrefetchEvent> events) {
  absl::MutexLock lock(&mutex_);
  prefetch_ = std::move(events);
}

void FakeDaemon::AnswerError(const std::string& call, grpc::Status status) {
  absl::MutexLock lock(&mutex_);
  errors_[call] = std::move(status);
}

int FakeDaemon::Calls(const std::string& call) const {
  absl::MutexLock lock(&mutex_);
  const auto found = calls_.find(call);
  return found == calls_.end() ? 0 : found->second;
}

int FakeDaemon::Answered(const std::string& call) const {
  absl::MutexLock lock(&mutex_);
  const auto found = answered_.find(call);
  return found == answered_.end() ? 0 : found->second;
}

uint64_t FakeDaemon::LastPosition() const {
  absl::MutexLock lock(&mutex_);
  return last_position_;
}

bool FakeDaemon::LastSessionOver() const {
  absl::MutexLock lock(&mutex_);
  return last_session_over_;
}

grpc::Status FakeDaemon::Enter(grpc::ServerContext* context, const std::string& call,
                               uint64_t session_id) {
  absl::MutexLock lock(&mutex_);
  ++calls_[call];
  while (hanging_ && !context->IsCancelled()) {
    mutex_.AwaitWithTimeout(absl::Condition(
                                +[](bool* hanging) { return !*hanging; }, &hanging_),
                            kPollInterval);
  }
  if (!context->IsCancelled()) ++answered_[call];
  if (const auto error = errors_.find(call); error != errors_.end()) return error->second;
  if (sessions_.contains(session_id)) return grpc::Status::OK;
  return grpc::Status(grpc::NOT_FOUND, "session_id: no such session");
}

grpc::Status FakeDaemon::OpenModel(grpc::ServerContext*, const v1::OpenModelRequest*,
                                   v1::Model* response) {
  *response = Model();
  return grpc::Status::OK;
}

grpc::Status FakeDaemon::Attach(grpc::ServerContext* context, const v1::AttachRequest*,
                                grpc::ServerWriter<v1::AttachEvent>* writer) {
  v1::AttachEvent event;
  uint64_t session_id;
  uint64_t cuts;
  {
    absl::MutexLock lock(&mutex_);
    ++calls_["Attach"];
    if (const auto error = errors_.find("Attach"); error != errors_.end()) return error->second;
    while (hanging_ && !context->IsCancelled()) {
      mutex_.AwaitWithTimeout(absl::Condition(
                                  +[](bool* hanging) { return !*hanging; }, &hanging_),
                              kPollInterval);
    }
    session_id = next_session_++;
    sessions_.insert(session_id);
    cuts = cuts_;
  }
  event.mutable_attached()->set_session_id(session_id);
  event.mutable_attached()->set_boot_id(boot_id_);
  event.mutable_attached()->set_handover_socket(handover_path_);
  writer->Write(event);
  bool told = false;
  absl::MutexLock lock(&mutex_);
  while (!context->IsCancelled() && cuts == cuts_) {
    if (draining_ && !told) {
      event.mutable_draining()->set_grace_ms(1000);
      told = writer->Write(event);
    }
    mutex_.AwaitWithTimeout(absl::Condition(
                                +[](bool*) { return false; }, &draining_),
                            kPollInterval);
  }
  sessions_.erase(session_id);
  return grpc::Status::OK;
}

grpc::Status FakeDaemon::LookupPrefix(grpc::ServerContext* context,
                                      const v1::LookupPrefixRequest* request,
                                      v1::LookupPrefixResponse* response) {
  const grpc::Status entered = Enter(context, "LookupPrefix", request->session_id());
  absl::MutexLock lock(&mutex_);
  *response = lookup_;
  return entered;
}

grpc::Status FakeDaemon::Prefetch(grpc::ServerContext* context, const v1::PrefetchRequest* request,
                                  grpc::ServerWriter<v1::PrefetchEvent>* writer) {
  const grpc::Status entered = Enter(context, "Prefetch", request->blocks().session_id());
  absl::MutexLock lock(&mutex_);
  for (const v1::PrefetchEvent& event : prefetch_) writer->Write(event);
  return entered;
}

grpc::Status FakeDaemon::Reserve(grpc::ServerContext* context, const v1::ReserveRequest* request,
                                 v1::ReserveResponse* response) {
  const grpc::Status entered = Enter(context, "Reserve", request->session_id());
  absl::MutexLock lock(&mutex_);
  last_position_ = request->position();
  if (!entered.ok()) return entered;
  // Room for as many blocks as the answer has.
  if (request->count() > static_cast<uint32_t>(reserve_.runs_size())) {
    return grpc::Status(grpc::RESOURCE_EXHAUSTED, "all is pinned");
  }
  for (uint32_t i = 0; i < request->count(); ++i) {
    *response->add_runs() = reserve_.runs(static_cast<int>(i));
  }
  return entered;
}

grpc::Status FakeDaemon::Put(grpc::ServerContext* context, const v1::PutRequest* request,
                             v1::LeaseState* response) {
  const grpc::Status entered = Enter(context, "Put", request->session_id());
  absl::MutexLock lock(&mutex_);
  last_position_ = request->position();
  *response = state_;
  return entered;
}

grpc::Status FakeDaemon::Truncate(grpc::ServerContext* context, const v1::TruncateRequest* request,
                                  v1::LeaseState* response) {
  const grpc::Status entered = Enter(context, "Truncate", request->session_id());
  absl::MutexLock lock(&mutex_);
  last_position_ = request->position();
  *response = state_;
  return entered;
}

grpc::Status FakeDaemon::Fork(grpc::ServerContext* context, const v1::ForkRequest* request,
                              v1::LeaseState* response) {
  const grpc::Status entered = Enter(context, "Fork", request->session_id());
  absl::MutexLock lock(&mutex_);
  *response = state_;
  return entered;
}

grpc::Status FakeDaemon::Release(grpc::ServerContext* context, const v1::ReleaseRequest* request,
                                 v1::ReleaseResponse*) {
  const grpc::Status entered = Enter(context, "Release", request->session_id());
  absl::MutexLock lock(&mutex_);
  last_session_over_ = request->session_over();
  return entered;
}

grpc::Status FakeDaemon::Download(grpc::ServerContext* context, const v1::DownloadRequest* request,
                                  grpc::ServerWriter<v1::DownloadChunk>* writer) {
  const grpc::Status entered = Enter(context, "Download", request->blocks().session_id());
  v1::DownloadChunk chunk;
  chunk.set_position(request->position());
  chunk.set_data(std::string(kBlockBytes, 'x'));
  chunk.set_block_bytes(kBlockBytes);
  while (entered.ok() && writer->Write(chunk)) chunk.set_position(chunk.position() + 1);
  return entered;
}

}  // namespace larder
