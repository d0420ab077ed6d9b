// DownloadReactor: the bytes of blocks over the wire, for who cannot map the arenas.
//
//   start -> own lease -> Cache::Prefetch(HOST) -> [news -> queue of readable blocks]*
//                                                        |
//                                  chunk <- 1 MiB of one block, straight from its arena
//
// A chunk is a DownloadChunk written by hand: a few bytes of header, then a slice that refers
// to the arena. gRPC sends it without a copy of ours; the slice owns a share of the pin. Of a block
// in a device's memory the slice is a bounce buffer, which the device fills before the write.
//
// Thread safety: see stream_reactor.h.
//
// Invariants:
//   1. A block stays pinned until gRPC has dropped the last slice of it, cancelled or not.
//   2. Chunks come in prefix order; each lies in one block, and no byte is left out before the
//      end that the status tells.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "larder/v1/kv_cache.pb.h"
#include "server/rpc/context.h"
#include "server/rpc/path_hold.h"
#include "server/rpc/stream_reactor.h"

namespace larder {

class DownloadReactor final : public StreamReactor<grpc::ByteBuffer> {
 public:
  static constexpr uint64_t kChunkBytesMax = 1 << 20;

  DownloadReactor(const RpcContext& context, const grpc::ByteBuffer& request);

 private:
  struct Readable {
    uint32_t position = 0;
    SlotRef at;
  };
  // A chunk's bytes on their way from the device.
  struct Bounce {
    std::vector<std::byte> bytes;
    absl::Status status;  // once `done`
    std::atomic<bool> done = false;
  };

  void Advance(uint32_t signals) override;
  void Cancelled() override;
  void Ended() override;
  absl::Status Start();
  absl::Status Claim();
  // Queues what became readable; false when nothing has and there is more to come.
  bool Poll();
  void Queue(const SlotRun& run);
  // Writes the next chunk, or asks for its bytes first.
  void Send();
  void FillBounce(Slot slot);
  void WriteChunk(const grpc::Slice& bytes);

  const RpcContext& context_;
  const grpc::ByteBuffer& raw_request_;

  // Touched by Step, and by Ended after the last one.
  v1::DownloadRequest request_;
  std::shared_ptr<PathHold> hold_;
  std::optional<PrefetchId> prefetch_;
  uint32_t end_ = 0;  // block past the last wanted one
  Model model_;
  std::deque<Readable> queue_;
  uint64_t offset_ = 0;             // in the first queued block: what was sent of it
  std::shared_ptr<Bounce> bounce_;  // null: none is on its way
  absl::Status result_;             // once prefetch_ is gone
  grpc::ByteBuffer chunk_;
};

}  // namespace larder
