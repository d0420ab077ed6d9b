// IoQueue: which operation of an IoBackend starts next.
//
//   reads   [ ][ ][ ]    first, as long as fewer than Limits::reads of them are under way
//   writes  [ ][ ]       beside reads only a few bytes at a time, but always one
//
// Whoever waits for a read waits for what is under way on the drive, so little of it may be
// writes. Nobody waits for a write, but a tier whose writes make no progress counts as sick.
//
// Thread safety: none; the owner locks.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <utility>

#include "storage/io_transfer.h"

namespace larder {

class IoQueue {
 public:
  // Of what is under way. One operation of a kind always may be, however large.
  struct Limits {
    uint32_t reads = 1;
    uint64_t read_bytes = 16 << 20;  // some ms of a drive: the next one waits for them
    uint32_t writes = 1;
    uint64_t write_bytes = 16 << 20;
    // While reads wait or are under way: a drive that serves all in turn spends a tenth of its
    // time on writes.
    uint64_t write_bytes_beside_reads = 1 << 20;
  };

  explicit IoQueue(const Limits& limits) : limits_(limits) {}

  bool empty() const { return reads_.waiting.empty() && writes_.waiting.empty(); }

  void Push(IoJob job) { (job.write ? writes_ : reads_).waiting.push_back(std::move(job)); }

  // Whether Next has one.
  bool MayStart() const { return MayRead() || MayWrite(); }

  // What starts now. It is under way until Done.
  std::optional<IoJob> Next() {
    if (MayRead()) return Start(reads_);
    if (MayWrite()) return Start(writes_);
    return std::nullopt;
  }

  // Of a job that Next gave out.
  void Done(bool write, uint64_t bytes) {
    Kind& kind = write ? writes_ : reads_;
    kind.under_way -= 1;
    kind.bytes_under_way -= bytes;
  }

 private:
  struct Kind {
    std::deque<IoJob> waiting;
    uint32_t under_way = 0;
    uint64_t bytes_under_way = 0;

    bool May(uint32_t count_max, uint64_t bytes_max) const {
      if (waiting.empty() || under_way >= count_max) return false;
      return under_way == 0 || bytes_under_way + waiting.front().bytes <= bytes_max;
    }
  };

  bool MayRead() const { return reads_.May(limits_.reads, limits_.read_bytes); }
  bool MayWrite() const {
    const bool beside_reads = reads_.under_way > 0 || !reads_.waiting.empty();
    return writes_.May(limits_.writes,
                       beside_reads ? limits_.write_bytes_beside_reads : limits_.write_bytes);
  }

  static IoJob Start(Kind& kind) {
    IoJob job = std::move(kind.waiting.front());
    kind.waiting.pop_front();
    kind.under_way += 1;
    kind.bytes_under_way += job.bytes;
    return job;
  }

  const Limits limits_;
  Kind reads_;
  Kind writes_;
};

}  // namespace larder
