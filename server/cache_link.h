// CacheLink: brings completions of moves to the cache while there is one.
//
// The mover outlives the cache and may complete moves at any time; the NVME store tells its
// health before there is a cache.
//
// Thread safety: thread-safe. Disconnect waits for calls under way; calls after it do nothing.
#pragma once

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "server/cache/cache.h"

namespace larder {

class CacheLink {
 public:
  void Connect(Cache* cache) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    cache_ = cache;
  }
  void Disconnect() { Connect(nullptr); }

  void OnMoveDone(MoveId id, absl::Status status) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::ReaderMutexLock lock(&mu_);
    if (cache_ != nullptr) cache_->OnMoveDone(id, std::move(status));
  }
  void LoseGpu() ABSL_LOCKS_EXCLUDED(mu_) {
    absl::ReaderMutexLock lock(&mu_);
    if (cache_ != nullptr) cache_->LoseGpu();
  }
  void SetNvmeWritable(bool writable) ABSL_LOCKS_EXCLUDED(mu_) {
    absl::ReaderMutexLock lock(&mu_);
    if (cache_ != nullptr) cache_->SetNvmeWritable(writable);
  }

 private:
  absl::Mutex mu_;
  Cache* cache_ ABSL_GUARDED_BY(mu_) = nullptr;
};

}  // namespace larder
