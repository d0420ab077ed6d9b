#include <algorithm>
#include <deque>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "storage/copier.h"
#include "storage/copy.h"

namespace larder {
namespace {

class ThreadCopier final : public Copier {
 public:
  explicit ThreadCopier(int threads) {
    for (int i = 0; i < std::max(threads, 1); ++i) threads_.emplace_back([this] { Run(); });
  }
  ~ThreadCopier() override {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    changed_.SignalAll();
    for (std::thread& thread : threads_) thread.join();
  }

  Limits limits() const override {
    const int threads = static_cast<int>(threads_.size());
    return {.batches = threads, .batches_each_way = threads, .batch_bytes = 0};
  }

  void Copy(Direction direction, Batch batch, DoneFn done) override {
    absl::MutexLock lock(&mu_);
    queued_.push_back({direction, std::move(batch), std::move(done)});
    changed_.Signal();
  }

 private:
  struct Work {
    Direction direction;
    Batch batch;
    DoneFn done;
  };

  // False: stopping, and nothing is queued.
  bool Next(Work& work) {
    absl::MutexLock lock(&mu_);
    while (queued_.empty()) {
      if (stopping_) return false;
      changed_.Wait(&mu_);
    }
    work = std::move(queued_.front());
    queued_.pop_front();
    return true;
  }

  void Run() {
    Work work;
    while (Next(work)) {
      for (const Piece& piece : work.batch) {
        const bool up = work.direction == Direction::kToGpu;
        CopyBlock(up ? piece.gpu : piece.host, up ? piece.host : piece.gpu, piece.bytes);
      }
      work.done(absl::OkStatus());
      work = {};
    }
  }

  absl::Mutex mu_;
  absl::CondVar changed_;
  std::deque<Work> queued_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;

  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace

std::unique_ptr<Copier> MakeThreadCopier(int threads) {
  return std::make_unique<ThreadCopier>(threads);
}

}  // namespace larder
