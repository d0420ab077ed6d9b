// MoveQueue: the jobs of one tier pair that have not started, in two classes.
//
// Thread safety: none; the owner locks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>

#include "storage/mover.h"

namespace larder {

class MoveQueue {
 public:
  struct Entry {
    MoveJob job;
    uint64_t order = 0;  // among all queues; grows
  };
  using Position = std::list<Entry>::iterator;

  bool empty() const { return waiting_.empty() && background_.empty(); }
  size_t size(MoveClass move_class) const { return ListOf(move_class).size(); }

  Position Push(const MoveJob& job, uint64_t order) {
    auto& list = ListOf(job.move_class);
    return list.insert(list.end(), {job, order});
  }

  // To the end of the waiting class. The position stays good.
  void Raise(Position position, uint64_t order) {
    if (position->job.move_class == MoveClass::kWaiting) return;
    position->job.move_class = MoveClass::kWaiting;
    position->order = order;
    waiting_.splice(waiting_.end(), background_, position);
  }

  // What starts next. Must not be empty.
  const Entry& Front() const { return waiting_.empty() ? background_.front() : waiting_.front(); }
  MoveJob Pop() {
    auto& list = waiting_.empty() ? background_ : waiting_;
    MoveJob job = list.front().job;
    list.pop_front();
    return job;
  }

 private:
  std::list<Entry>& ListOf(MoveClass c) {
    return c == MoveClass::kWaiting ? waiting_ : background_;
  }
  const std::list<Entry>& ListOf(MoveClass c) const {
    return c == MoveClass::kWaiting ? waiting_ : background_;
  }

  std::list<Entry> waiting_;
  std::list<Entry> background_;
};

}  // namespace larder
