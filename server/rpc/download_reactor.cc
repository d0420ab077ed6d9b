#include "server/rpc/download_reactor.h"

#include <google/protobuf/io/coded_stream.h>
#include <grpcpp/impl/codegen/proto_utils.h>

#include <algorithm>
#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/rpc/validate.h"

namespace larder {
namespace {

// Tag bytes of DownloadChunk: (field number << 3) | wire type, 0 a varint, 2 a length.
constexpr uint32_t kPositionTag = 1 << 3 | 0;
constexpr uint32_t kOffsetTag = 2 << 3 | 0;
constexpr uint32_t kDataTag = 3 << 3 | 2;
constexpr uint32_t kBlockBytesTag = 4 << 3 | 0;

// Everything of a DownloadChunk but the bytes of `data`, which come last.
grpc::Slice EncodeHeader(uint32_t position, uint64_t offset, uint64_t block_bytes, uint64_t size) {
  using google::protobuf::io::CodedOutputStream;
  std::array<uint8_t, 64> buffer;
  uint8_t* at = buffer.data();
  for (const auto& [tag, value] : {std::pair<uint32_t, uint64_t>{kPositionTag, position},
                                   {kOffsetTag, offset},
                                   {kBlockBytesTag, block_bytes},
                                   {kDataTag, size}}) {
    at = CodedOutputStream::WriteVarint32ToArray(tag, at);
    at = CodedOutputStream::WriteVarint64ToArray(value, at);
  }
  return grpc::Slice(buffer.data(), static_cast<size_t>(at - buffer.data()));
}

// Refers to memory that `owner` keeps: the pin of a block in an arena, or a bounce buffer.
template <typename T>
grpc::Slice OwnedSlice(std::span<std::byte> bytes, std::shared_ptr<T> owner) {
  using Owner = std::shared_ptr<T>;
  return grpc::Slice(
      bytes.data(), bytes.size(), [](void* kept) { delete static_cast<Owner*>(kept); },
      new Owner(std::move(owner)));
}

}  // namespace

DownloadReactor::DownloadReactor(const RpcContext& context, const grpc::ByteBuffer& request)
    : StreamReactor(context.calls, Method::kDownload), context_(context), raw_request_(request) {}

absl::Status DownloadReactor::Start() {
  grpc::ByteBuffer copy(raw_request_);  // of the reference; parsing consumes it
  if (!grpc::SerializationTraits<v1::DownloadRequest>::Deserialize(&copy, &request_).ok()) {
    return absl::InvalidArgumentError("request: not a larder.v1.DownloadRequest");
  }
  if (absl::Status status = Validate(request_); !status.ok()) return status;
  absl::StatusOr<std::shared_ptr<PathHold>> hold =
      PathHold::Of(context_.cache, context_.sessions, request_.blocks());
  if (!hold.ok()) return hold.status();
  hold_ = *std::move(hold);
  return Claim();
}

absl::Status DownloadReactor::Claim() {
  Cache& cache = context_.cache;
  const absl::StatusOr<Model> model = cache.ModelOfLease(hold_->session(), hold_->lease());
  if (!model.ok()) return model.status();
  model_ = *model;
  const uint32_t position = request_.position();
  const uint32_t blocks = hold_->blocks();
  if (request_.blocks().lease_id() != 0 && position > blocks) {
    return absl::InvalidArgumentError(
        absl::StrCat("position: ", position, " given, at most ", blocks, ", the lease's end"));
  }
  end_ = blocks;
  if (request_.count() != 0) {
    end_ = static_cast<uint32_t>(std::min<uint64_t>(blocks, uint64_t{position} + request_.count()));
  }
  if (position >= end_) return absl::OkStatus();
  if (end_ < blocks) {
    const auto cut = cache.Truncate(hold_->session(), hold_->lease(), end_);
    if (!cut.ok()) return cut.status();
  }
  const absl::StatusOr<PrefetchId> id =
      cache.Prefetch(hold_->session(), hold_->lease(), Tier::kHost, [weak = weak_from_this()] {
        if (const auto self = weak.lock()) self->Signal(kStepNews);
      });
  if (!id.ok()) return id.status();
  prefetch_ = *id;
  return absl::OkStatus();
}

void DownloadReactor::Queue(const SlotRun& run) {
  for (size_t i = 0; i < run.slots.size(); ++i) {
    const uint32_t position = run.position + static_cast<uint32_t>(i);
    if (position < request_.position() || position >= end_) continue;
    queue_.push_back({position, {run.tier, run.slots[i]}});
  }
}

bool DownloadReactor::Poll() {
  const absl::StatusOr<PrefetchUpdate> update = context_.cache.PollPrefetch(*prefetch_);
  if (!update.ok()) {
    prefetch_.reset();
    result_ = update.status();
    return true;
  }
  for (const SlotRun& run : update->runs) Queue(run);
  if (!update->done) return !update->runs.empty();
  prefetch_.reset();
  if (update->unreadable_position) {
    result_ = absl::DataLossError(
        absl::StrCat("block ", *update->unreadable_position, " could not be read"));
  } else if (update->ready_blocks < end_) {
    result_ =
        absl::ResourceExhaustedError(absl::StrCat("HOST: room for ", update->ready_blocks, " of ",
                                                  end_, " blocks; ask for the others apart"));
  }
  return true;
}

void DownloadReactor::Advance(uint32_t signals) {
  if ((signals & kStepStart) != 0) {
    if (absl::Status status = Start(); !status.ok()) {
      End(status);
      return;
    }
  }
  while (queue_.empty() && prefetch_) {
    if (!Poll()) return;
  }
  if (queue_.empty()) {
    End(result_);
  } else {
    Send();
  }
}

void DownloadReactor::Send() {
  const Readable& block = queue_.front();
  const std::span<std::byte> bytes = context_.BytesOf(model_, block.at, offset_);
  if (!bytes.empty()) {
    const uint64_t size = std::min<uint64_t>(kChunkBytesMax, bytes.size());
    WriteChunk(OwnedSlice(bytes.first(size), hold_));
  } else if (bounce_ == nullptr) {
    FillBounce(block.at.slot);
  } else if (bounce_->done) {
    const std::shared_ptr<Bounce> bounce = std::move(bounce_);
    if (!bounce->status.ok()) {
      End(absl::Status(bounce->status.code(),
                       absl::StrCat("block ", block.position,
                                    " could not be read: ", bounce->status.message())));
      return;
    }
    WriteChunk(OwnedSlice(bounce->bytes, bounce));
  }
}

// The pin stays until the device has read the block, cancelled or not.
void DownloadReactor::FillBounce(Slot slot) {
  const auto rank = static_cast<uint32_t>(offset_ / model_.block_bytes);
  const uint64_t in_part = offset_ % model_.block_bytes;
  bounce_ = std::make_shared<Bounce>();
  bounce_->bytes.resize(std::min<uint64_t>(kChunkBytesMax, model_.block_bytes - in_part));
  context_.read_gpu(rank, slot.offset() + in_part, bounce_->bytes,
                    [weak = weak_from_this(), bounce = bounce_, pin = hold_](absl::Status status) {
                      bounce->status = std::move(status);
                      bounce->done = true;
                      if (const auto self = weak.lock()) self->Signal(kStepNews);
                    });
}

void DownloadReactor::WriteChunk(const grpc::Slice& bytes) {
  const uint64_t size = bytes.size();
  const std::array<grpc::Slice, 2> slices = {
      EncodeHeader(queue_.front().position, offset_, model_.WholeBlockBytes(), size), bytes};
  chunk_ = grpc::ByteBuffer(slices.data(), slices.size());
  offset_ += size;
  if (offset_ == model_.WholeBlockBytes()) {
    offset_ = 0;
    queue_.pop_front();
  }
  Write(chunk_, /*more=*/!queue_.empty());
}

void DownloadReactor::Cancelled() {
  if (prefetch_) context_.cache.CancelPrefetch(*prefetch_);
  prefetch_.reset();
}

void DownloadReactor::Ended() {
  Cancelled();
  chunk_.Clear();
  hold_.reset();
}

}  // namespace larder
