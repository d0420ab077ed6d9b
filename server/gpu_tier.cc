#include "server/gpu_tier.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/log.h"
#include "storage/copier_cuda.h"

namespace larder {
namespace {

// How often memory that others hold is asked for again.
constexpr absl::Duration kRetryPeriod = absl::Milliseconds(100);

absl::StatusOr<std::shared_ptr<CudaDevice>> OpenDevice(const std::string& which) {
  CudaOr<std::shared_ptr<CudaDevice>> device = CudaDevice::Open(which);
  if (device.ok()) return std::move(device.value);
  const absl::Status status = FromCuda(device.status);
  // A device that fell off its bus has no name any more: to us it is missing, not misspelt.
  return absl::IsInvalidArgument(status) ? absl::FailedPreconditionError(status.message()) : status;
}

absl::StatusOr<std::unique_ptr<CudaArena>> CreateArena(const std::shared_ptr<CudaDevice>& device,
                                                       const Config& config, absl::Time deadline) {
  for (bool told = false;; told = true) {
    auto arena = CudaArena::Create(device, config.gpu_bytes, config.gpu_reserve);
    if (!absl::IsAborted(arena.status()) || absl::Now() >= deadline) return arena;
    if (!told) {
      Log(LogLevel::kWarning, "gpu memory is held by other processes, waiting",
          {{"why", std::string(arena.status().message())}});
    }
    absl::SleepFor(kRetryPeriod);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<GpuTier>> GpuTier::Create(const Config& config, const Arena& host,
                                                         Options options) {
  std::unique_ptr<GpuTier> tier(new GpuTier);
  const absl::Status status = config.gpu == GpuBackend::kCuda
                                  ? tier->CreateCuda(config, host, std::move(options))
                                  : tier->CreateEmulated(config);
  if (!status.ok()) return status;
  return tier;
}

absl::Status GpuTier::CreateEmulated(const Config& config) {
  backend_ = "emulated";
  for (uint32_t rank = 0; rank < config.gpu_ranks; ++rank) {
    absl::StatusOr<std::unique_ptr<Arena>> arena =
        Arena::Create({.name = absl::StrCat("larder-gpu-", rank),
                       .bytes = config.gpu_bytes,
                       .huge_pages = config.huge_pages,
                       .prefault_threads = static_cast<int>(config.prefault_threads)});
    if (!arena.ok()) return arena.status();
    arenas_.push_back(*std::move(arena));
  }
  return absl::OkStatus();
}

absl::Status GpuTier::CreateCuda(const Config& config, const Arena& host, Options options) {
  backend_ = "cuda";
  const absl::Time deadline = absl::Now() + options.patience;
  CudaCopier::Options copier_options;
  copier_options.on_lost = std::move(options.on_lost);
  for (const std::string& which : config.gpu_devices) {
    absl::StatusOr<std::shared_ptr<CudaDevice>> device = OpenDevice(which);
    if (!device.ok()) return device.status();
    auto arena = CreateArena(*device, config, deadline);
    if (!arena.ok()) return arena.status();
    if (registration_ == nullptr) registration_ = std::make_unique<CudaRegistration>(*device, host);
    const bool registered = registration_->status().ok();
    Log(registered ? LogLevel::kInfo : LogLevel::kWarning,
        registered ? "gpu opened" : "gpu opened; HOST is not registered with it, copies are slower",
        {{"device", (*device)->name()},
         {"bytes", (*arena)->bytes()},
         {"host", registered ? "registered" : std::string(registration_->status().message())}});
    arenas_.push_back(*std::move(arena));
    devices_.push_back(*std::move(device));
  }
  copier_options.devices = devices_;
  absl::StatusOr<std::unique_ptr<CudaCopier>> copier = CudaCopier::Start(std::move(copier_options));
  if (!copier.ok()) return copier.status();
  copier_ = *std::move(copier);
  absl::StatusOr<std::unique_ptr<GpuReader>> reader = GpuReader::Create(*copier_, devices_[0]);
  if (!reader.ok()) return reader.status();
  reader_ = *std::move(reader);
  return absl::OkStatus();
}

void GpuTier::LeaveToProcessEnd() {
  for (const std::shared_ptr<CudaDevice>& device : devices_) device->Abandon();
}

absl::Status GpuTier::health() const {
  return copier_ == nullptr ? absl::OkStatus() : copier_->health();
}

}  // namespace larder
