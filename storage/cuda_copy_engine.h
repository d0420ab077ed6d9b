// CudaCopyEngine: copies between one device and host memory, by the device's copy engines.
//
//   to device   queued [batch][batch]  ->  stream 0 [batch]    one batch a stream, so that what is
//                                      ->  stream 1 [batch]    queued starts in the order in which
//                                      ->  stream 2 [batch]    it came, and the next ones are with
//   to host     queued [batch]         ->  stream 3 [batch]    the device while one is copied and
//                                      ->  stream 4 [batch]    until its end is seen
//                                      ->  stream 5 [batch]
//
// One thread issues copies and asks for their ends. Asking, because the driver calls no host
// function after an error, and a thread that waits in the driver can neither time out nor be
// stopped: a device that hangs would take the daemon with it.
//
// Thread safety: thread-safe. DoneFn and on_lost run on the engine's thread, without a lock held.
//
// Invariants:
//   1. DoneFn is called exactly once for each batch, never from inside Copy.
//   2. After OK every byte of the batch is there. After an error nobody writes to its host memory
//      any more; what the device's memory holds is undefined.
//   3. A device that failed once is lost for good: no context recovers from an error of its
//      copies. What is queued or handed over from then on fails at once. on_lost is called before
//      the first batch fails, once.
//   4. A device that does nothing for stall_limit is lost as well. Batches to it fail; batches to
//      host that are with the device already do not end before Stop, since it may write their
//      memory yet.
//   5. After an error the driver answers for every batch as if it had ended. Those to host that are
//      with the device fail only a second later: until then a copy may not have been stopped.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "storage/cuda_device.h"

namespace larder {

class CudaCopyEngine {
 public:
  enum Direction { kToHost = 0, kToDevice = 1 };
  struct Piece {
    CudaPointer device = 0;
    std::byte* host = nullptr;
    uint64_t bytes = 0;
    friend bool operator==(const Piece&, const Piece&) = default;
  };
  using Batch = std::vector<Piece>;
  using DoneFn = std::function<void(const CudaStatus&)>;

  struct Options {
    int streams_each_way = 3;
    // A device with PCIe 3 needs 1 ms for 12 MiB.
    std::chrono::milliseconds stall_limit{10000};
    // How long copies may go on after an error of their context, of which the driver tears down all
    // that it runs. That takes milliseconds.
    std::chrono::milliseconds settle{1000};
    DoneFn on_lost = [](const CudaStatus&) {};
  };

  static CudaOr<std::unique_ptr<CudaCopyEngine>> Start(std::shared_ptr<CudaDevice> device,
                                                       Options options);

  ~CudaCopyEngine();  // stops, and waits for it
  CudaCopyEngine(const CudaCopyEngine&) = delete;
  CudaCopyEngine& operator=(const CudaCopyEngine&) = delete;

  // Queues a batch. Its memory belongs to the engine until DoneFn is called.
  void Copy(Direction direction, Batch batch, DoneFn done);

  // Batches that are queued fail, those with the device are waited for, stall_limit at most.
  // Then they fail too, and the device is abandoned. Does not wait; no batch may follow.
  void Stop();

  // Neighbours that lie one behind the other on both sides become one copy: each costs the
  // driver microseconds, whatever its size.
  static Batch Coalesce(const Batch& batch);

 private:
  using Clock = std::chrono::steady_clock;
  struct Work {
    Batch batch;
    DoneFn done;
  };
  struct Lane {  // a stream and the batch with it
    Direction direction = kToHost;
    CudaStream* stream = nullptr;
    CudaEvent* event = nullptr;
    DoneFn done;  // none: the lane is free
    CudaStatus failure;
    bool settles = false;  // the driver has answered with an error (invariant 5)
  };
  struct Finished {
    DoneFn done;
    CudaStatus status;
  };

  CudaCopyEngine(std::shared_ptr<CudaDevice> device, Options options)
      : device_(std::move(device)), options_(std::move(options)) {}

  CudaStatus OpenLanes();
  void CloseLanes();
  void Run();
  bool Refill();
  void Issue(Lane& lane, Work work);
  void Poll(std::vector<Finished>& finished);
  void Lose(const CudaStatus& why);
  void FailQueued(std::vector<Finished>& finished);
  void FailStalled(std::vector<Finished>& finished);
  bool Busy() const;

  const std::shared_ptr<CudaDevice> device_;
  const Options options_;

  // The thread's own.
  std::vector<Lane> lanes_;
  CudaStatus lost_;
  // When a batch last began on an idle device or ended, or the device was lost.
  Clock::time_point progress_;

  std::mutex mu_;
  std::condition_variable changed_;
  std::array<std::deque<Work>, 2> queued_;  // guarded by mu_
  bool stopping_ = false;                   // guarded by mu_

  std::thread thread_;  // last: it uses all of the above
};

}  // namespace larder
