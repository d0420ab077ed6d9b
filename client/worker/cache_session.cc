#include "client/worker/cache_session.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "storage/cuda_device.h"

namespace larder::worker {
namespace {

constexpr absl::Duration kPauseMin = absl::Milliseconds(100);
constexpr absl::Duration kPauseMax = absl::Seconds(5);
// Models of one shard lie in the first rank's memory, which is the first arena (handover.h).
constexpr uint32_t kGpuArena = 0;

v1::DType WireType(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return v1::DTYPE_F32;
    case Dtype::kF16:
      return v1::DTYPE_F16;
    case Dtype::kBf16:
      return v1::DTYPE_BF16;
    case Dtype::kF8E4M3:
      return v1::DTYPE_F8_E4M3;
    case Dtype::kI8:
      return v1::DTYPE_I8;
  }
  return v1::DTYPE_UNSPECIFIED;
}

}  // namespace

std::string DeviceName(const DeviceUuid& uuid) {
  CudaUuid same;
  std::copy(uuid.begin(), uuid.end(), same.bytes);
  return FormatCudaUuid(same);
}

v1::ModelSpec SpecOf(std::string_view name, const KvGeometry& geometry) {
  v1::ModelSpec spec;
  spec.set_name(std::string(name));
  spec.set_weights_revision(geometry.weights_revision);
  spec.set_layers(geometry.layers);
  spec.set_kv_heads(geometry.kv_heads);
  spec.set_head_dim(geometry.head_dim);
  spec.set_dtype(WireType(geometry.dtype));
  spec.set_block_tokens(geometry.block_tokens);
  spec.set_shards(1);
  return spec;
}

CacheSession::CacheSession(CacheOptions options, v1::ModelSpec spec,
                           std::optional<DeviceUuid> device, Notice on_notice)
    : options_(std::move(options)),
      spec_(std::move(spec)),
      device_(device.has_value() ? DeviceName(*device) : ""),
      on_notice_(on_notice ? std::move(on_notice) : [](std::string_view) {}),
      lost_(absl::UnavailableError("not attached yet")),
      pause_(kPauseMin) {
  if (absl::Status attached = Attach(); !attached.ok()) {
    Detach(attached);
    Pause();
  }
}

// A client of its own for each attempt: one that has no channel yet fails at once where nobody
// listens, and one that lost its daemon waits for it.
absl::Status CacheSession::Attach() {
  absl::StatusOr<Client> client = Client::Connect(
      options_.address, {.call_timeout = options_.timeout, .connect_timeout = options_.timeout});
  if (!client.ok()) return client.status();
  absl::StatusOr<v1::Model> model = client->OpenModel(spec_);
  if (!model.ok()) return model.status();
  absl::StatusOr<Session> session = client->NewSession(options_.worker);
  if (!session.ok()) return session.status();
  if (absl::Status checked = CheckDevice(*session); !checked.ok()) return checked;
  client_ = *std::move(client);
  model_ = *std::move(model);
  session_ = *std::move(session);
  lost_ = absl::OkStatus();
  pause_ = kPauseMin;
  return absl::OkStatus();
}

absl::Status CacheSession::CheckDevice(const Session& session) const {
  if (device_.empty()) return absl::OkStatus();
  const absl::StatusOr<DeviceArena> arena = session.Device(kGpuArena);
  if (absl::IsUnavailable(arena.status())) return arena.status();
  if (arena.ok() && arena->device == device_) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("cache: the larderd at ", options_.address, " has no GPU tier for ", device_,
                   ", where this worker computes (",
                   arena.ok() ? absl::StrCat("it is on ", arena->device) : arena.status().message(),
                   "); start it with --gpu=cuda:", device_, " and --gpu-bytes"));
}

void CacheSession::Detach(const absl::Status& why) {
  on_notice_(absl::StrCat("computing without the cache: ", why.message()));
  session_.reset();
  client_.reset();
  lost_ = why;
}

void CacheSession::Pause() {
  next_attempt_ = absl::Now() + pause_;
  pause_ = std::min(pause_ * 2, kPauseMax);
}

absl::StatusOr<Lease> CacheSession::Lookup(std::span<const uint32_t> tokens,
                                           const LookupOptions& options) {
  Tend();
  if (!session_.has_value()) {
    if (absl::Now() < next_attempt_) return lost_;
    if (absl::Status attached = Attach(); !attached.ok()) {
      Pause();
      return attached;
    }
    on_notice_("using the cache again");
  }
  absl::StatusOr<Lease> lease = session_->Lookup(model_, tokens, options);
  const bool silent = absl::IsDeadlineExceeded(lease.status());
  if (silent || absl::IsUnavailable(lease.status())) {
    Detach(lease.status());
    Pause();
  }
  return lease;
}

void CacheSession::Tend() {
  if (!session_.has_value()) return;
  if (const absl::Status health = session_->Health(); !health.ok()) {
    Detach(health);
  } else if (session_->Draining()) {
    Detach(absl::UnavailableError("the daemon is stopping"));
    Pause();
  }
}

}  // namespace larder::worker
