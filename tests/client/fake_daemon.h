// FakeDaemon: a gRPC server and a hand-over socket in this process, whose answers are set by the
// test. One small HOST arena (Run.arena 1) and the GPU arenas of two ranks (Run.arena 4 and 5);
// blocks of 4,096 bytes and 4 tokens.
//
// Thread safety: thread-safe; answers are set between calls.
#pragma once

#include <grpcpp/grpcpp.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "larder/v1/kv_cache.grpc.pb.h"
#include "storage/arena.h"
#include "storage/handover.h"

namespace larder {

class FakeDaemon final : public v1::KvCache::Service {
 public:
  static constexpr uint64_t kArenaBytes = 1 << 20;
  static constexpr uint32_t kBlockBytes = 4096;
  static constexpr uint32_t kBlockTokens = 4;
  static constexpr uint64_t kModelId = 0x10;

  // Listens in `directory`; a second one there after the first is gone is its restart.
  FakeDaemon(const std::string& directory, uint64_t boot_id);
  // As a kill: streams and calls end at once.
  ~FakeDaemon() override;

  const std::string& address() const { return address_; }
  std::span<std::byte> arena() { return {arena_->base(), arena_->bytes()}; }
  std::span<std::byte> gpu(uint32_t rank) { return {gpus_[rank]->base(), gpus_[rank]->bytes()}; }
  static v1::Model Model();
  static v1::Run GpuRun(uint32_t position, const std::vector<uint64_t>& offsets);
  static v1::Run HostRun(uint32_t position, const std::vector<uint64_t>& offsets);

  // --- What it does --------------------------------------------------------------------

  void CutStreams() ABSL_LOCKS_EXCLUDED(mutex_);  // sessions end, the daemon lives
  void Drain() ABSL_LOCKS_EXCLUDED(mutex_);
  void HangCalls() ABSL_LOCKS_EXCLUDED(mutex_);  // until their deadline, or
  void ResumeCalls() ABSL_LOCKS_EXCLUDED(mutex_);
  void AnswerLookup(v1::LookupPrefixResponse answer) ABSL_LOCKS_EXCLUDED(mutex_);
  void AnswerReserve(v1::ReserveResponse answer) ABSL_LOCKS_EXCLUDED(mutex_);
  void AnswerState(v1::LeaseState answer) ABSL_LOCKS_EXCLUDED(mutex_);  // Put, Truncate, Fork
  void AnswerPrefetch(std::vector<v1::PrefetchEvent> events) ABSL_LOCKS_EXCLUDED(mutex_);
  // Every call of this name fails until it is OK again.
  void AnswerError(const std::string& call, grpc::Status status) ABSL_LOCKS_EXCLUDED(mutex_);

  // How often a call came, refused ones included.
  int Calls(const std::string& call) const ABSL_LOCKS_EXCLUDED(mutex_);
  // How many of them have been answered before their deadline.
  int Answered(const std::string& call) const ABSL_LOCKS_EXCLUDED(mutex_);
  uint64_t LastPosition() const ABSL_LOCKS_EXCLUDED(mutex_);  // of Reserve, Put or Truncate
  bool LastSessionOver() const ABSL_LOCKS_EXCLUDED(mutex_);

  // --- v1::KvCache ---------------------------------------------------------------------

  grpc::Status OpenModel(grpc::ServerContext* context, const v1::OpenModelRequest* request,
                         v1::Model* response) override;
  grpc::Status Attach(grpc::ServerContext* context, const v1::AttachRequest* request,
                      grpc::ServerWriter<v1::AttachEvent>* writer) override;
  grpc::Status LookupPrefix(grpc::ServerContext* context, const v1::LookupPrefixRequest* request,
                            v1::LookupPrefixResponse* response) override;
  grpc::Status Prefetch(grpc::ServerContext* context, const v1::PrefetchRequest* request,
                        grpc::ServerWriter<v1::PrefetchEvent>* writer) override;
  grpc::Status Reserve(grpc::ServerContext* context, const v1::ReserveRequest* request,
                       v1::ReserveResponse* response) override;
  grpc::Status Put(grpc::ServerContext* context, const v1::PutRequest* request,
                   v1::LeaseState* response) override;
  grpc::Status Truncate(grpc::ServerContext* context, const v1::TruncateRequest* request,
                        v1::LeaseState* response) override;
  grpc::Status Fork(grpc::ServerContext* context, const v1::ForkRequest* request,
                    v1::LeaseState* response) override;
  grpc::Status Release(grpc::ServerContext* context, const v1::ReleaseRequest* request,
                       v1::ReleaseResponse* response) override;
  grpc::Status Download(grpc::ServerContext* context, const v1::DownloadRequest* request,
                        grpc::ServerWriter<v1::DownloadChunk>* writer) override;

 private:
  // Counts the call, hangs if told to, and refuses unknown sessions as a daemon does.
  grpc::Status Enter(grpc::ServerContext* context, const std::string& call, uint64_t session_id)
      ABSL_LOCKS_EXCLUDED(mutex_);

  const uint64_t boot_id_;
  const std::string handover_path_;
  const std::string address_;
  const std::unique_ptr<Arena> arena_;
  const std::array<std::unique_ptr<Arena>, 2> gpus_;
  std::unique_ptr<HandoverServer> handover_;
  std::unique_ptr<grpc::Server> server_;

  mutable absl::Mutex mutex_;
  std::set<uint64_t> sessions_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_session_ ABSL_GUARDED_BY(mutex_);
  uint64_t cuts_ ABSL_GUARDED_BY(mutex_) = 0;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool hanging_ ABSL_GUARDED_BY(mutex_) = false;
  v1::LookupPrefixResponse lookup_ ABSL_GUARDED_BY(mutex_);
  v1::ReserveResponse reserve_ ABSL_GUARDED_BY(mutex_);
  v1::LeaseState state_ ABSL_GUARDED_BY(mutex_);
  std::vector<v1::PrefetchEvent> prefetch_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, grpc::Status> errors_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, int> calls_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, int> answered_ ABSL_GUARDED_BY(mutex_);
  uint64_t last_position_ ABSL_GUARDED_BY(mutex_) = 0;
  bool last_session_over_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace larder
