#include "storage/copier_cuda.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "storage/arena_cuda.h"
#include "storage/check.h"

namespace larder {
namespace {

// One batch in the engines of several devices.
struct Spread {
  absl::Mutex mu;
  size_t left ABSL_GUARDED_BY(mu) = 0;
  absl::Status status ABSL_GUARDED_BY(mu);
  Copier::DoneFn done;
};

void PartDone(Spread& spread, absl::Status status) {
  {
    absl::MutexLock lock(&spread.mu);
    spread.status.Update(std::move(status));
    if (--spread.left > 0) return;
    status = spread.status;
  }
  spread.done(std::move(status));
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaCopier>> CudaCopier::Start(Options options) {
  LARDER_CHECK(!options.devices.empty());
  std::unique_ptr<CudaCopier> copier(new CudaCopier(std::move(options.on_lost)));
  for (std::shared_ptr<CudaDevice>& device : options.devices) {
    CudaCopyEngine::Options engine_options;
    engine_options.stall_limit = absl::ToChronoMilliseconds(options.stall_limit);
    engine_options.on_lost = [raw = copier.get(), name = device->name()](const CudaStatus& why) {
      raw->Lose(absl::UnavailableError(absl::StrCat(name, ": ", why.text)));
    };
    auto engine = CudaCopyEngine::Start(std::move(device), std::move(engine_options));
    if (!engine.ok()) return FromCuda(engine.status);
    copier->engines_.push_back(std::move(engine.value));
  }
  return copier;
}

CudaCopier::~CudaCopier() = default;

void CudaCopier::Stop() {
  for (const std::unique_ptr<CudaCopyEngine>& engine : engines_) engine->Stop();
}

void CudaCopier::Lose(const absl::Status& why) {
  {
    absl::MutexLock lock(&mu_);
    if (!health_.ok()) return;
    health_ = why;
  }
  on_lost_(why);
}

absl::Status CudaCopier::health() const {
  absl::MutexLock lock(&mu_);
  return health_;
}

void CudaCopier::Copy(Direction direction, Batch batch, DoneFn done) {
  std::vector<CudaCopyEngine::Batch> parts(engines_.size());
  for (const Piece& piece : batch) {
    parts[piece.rank].push_back(
        {reinterpret_cast<CudaPointer>(piece.gpu), piece.host, piece.bytes});
  }
  auto spread = std::make_shared<Spread>();
  spread->done = std::move(done);
  {
    absl::MutexLock lock(&spread->mu);
    for (const CudaCopyEngine::Batch& part : parts) spread->left += !part.empty();
  }
  const auto way =
      direction == Direction::kToGpu ? CudaCopyEngine::kToDevice : CudaCopyEngine::kToHost;
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    if (parts[rank].empty()) continue;
    engines_[rank]->Copy(way, std::move(parts[rank]), [spread](const CudaStatus& status) {
      PartDone(*spread, FromCuda(status));
    });
  }
}

}  // namespace larder
