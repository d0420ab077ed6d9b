#include "bare_stream.h"

#include <pthread.h>
#include <signal.h>

#include <cstdio>
#include <vector>

#include "daemon_fixture.h"

namespace larder::bench {
namespace {

using RawService = v1::KvCache::WithRawCallbackMethod_Download<v1::KvCache::Service>;

class Writer final : public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  explicit Writer(const std::vector<grpc::ByteBuffer>& chunks) : chunks_(chunks) { Next(); }

 private:
  void Next() {
    if (at_ == chunks_.size()) {
      Finish(grpc::Status::OK);
    } else {
      chunk_ = chunks_[at_++];  // refers to the same bytes
      StartWrite(&chunk_);
    }
  }
  void OnWriteDone(bool ok) override {
    ok ? Next() : Finish(grpc::Status(grpc::StatusCode::CANCELLED, "the client is gone"));
  }
  void OnDone() override { delete this; }

  const std::vector<grpc::ByteBuffer>& chunks_;
  size_t at_ = 0;
  grpc::ByteBuffer chunk_;
};

class BareService final : public RawService {
 public:
  BareService() {
    for (uint32_t i = 0; i < kBlocks; ++i) {
      v1::DownloadChunk chunk;
      chunk.set_position(i);
      chunk.set_block_bytes(kBlockBytes);
      chunk.set_data(std::string(kBlockBytes, static_cast<char>(i)));
      const grpc::Slice slice(chunk.SerializeAsString());
      chunks_.emplace_back(&slice, 1);
    }
  }

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Download(grpc::CallbackServerContext*,
                                                       const grpc::ByteBuffer*) override {
    return new Writer(chunks_);
  }

 private:
  std::vector<grpc::ByteBuffer> chunks_;
};

}  // namespace

int ServeBareStream(const std::string& address) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  BareService service;
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials());
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::printf("bare stream ready\n");
  std::fflush(stdout);
  int signal = 0;
  sigwait(&signals, &signal);
  server->Shutdown();
  return 0;
}

}  // namespace larder::bench
