// The sides of the drive's benchmarks: NvmeStore, and what it is measured against. Each stores
// the same blocks and reads them back.
//
// Thread safety: none; a benchmark's main thread. A side has threads of its own where that is
// how it is fast.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "storage/arena.h"
#include "storage/nvme_store.h"

namespace larder::bench {

struct DaemonPlace;  // daemon_fixture.h

// Blocks with random content, in an arena as the daemon's.
//
// A virtual drive is often a thread of the host's that copies, and then memory that the caches
// hold is read into faster: up to 1.3 x here, more than any two sides differ by. So all sides
// read into the same few MiB.
class Blocks {
 public:
  // What the mover has under way at most.
  static constexpr uint64_t kBytes = uint64_t{128} << 20;
  static constexpr uint64_t kReadBytes = uint64_t{32} << 20;

  explicit Blocks(uint64_t block_bytes);

  uint64_t block_bytes() const { return block_bytes_; }
  uint32_t count() const { return static_cast<uint32_t>(kBytes / block_bytes_); }
  uint32_t read_count() const { return static_cast<uint32_t>(kReadBytes / block_bytes_); }
  std::span<std::byte> all() const { return {arena_->base(), arena_->bytes()}; }
  // Where block i comes from when it is written, and where it goes when it is read.
  std::span<const std::byte> From(uint64_t i) const { return At(i % count()); }
  std::span<std::byte> To(uint64_t i) const { return At(i % read_count()); }

 private:
  std::span<std::byte> At(uint64_t place) const {
    return all().subspan(place * block_bytes_, block_bytes_);
  }

  const uint64_t block_bytes_;
  std::unique_ptr<Arena> arena_;
};

class NvmeSide {
 public:
  virtual ~NvmeSide() = default;
  // Of each block by its number, in this order; block n's bytes come from, and go to, anywhere
  // in the Blocks. When Write returns all of it is as durable as the side can make it.
  virtual absl::Status Write(std::span<const uint32_t> blocks) = 0;
  virtual absl::Status Read(std::span<const uint32_t> blocks) = 0;
};

class ServerSide : public NvmeSide {
 public:
  // The server's process, as in a crash. Nothing else may be called then.
  virtual void Kill() = 0;
};

// Block n in the slot that follows block n - 1's.
std::unique_ptr<NvmeSide> MakeStoreSide(NvmeStore& store, const Blocks& blocks);

// Block n at byte n * block_bytes of a file, by io_uring: registered buffers, O_DIRECT, at most
// 32 operations and 16 MiB under way, as the store has them; one fdatasync at the end.
absl::StatusOr<std::unique_ptr<NvmeSide>> MakeRawSide(const std::string& path,
                                                      const Blocks& blocks);

// RocksDB with blob files, direct I/O, no compression and no log: it writes a block once, and a
// flush at the end makes all durable. Reads by 16 threads.
absl::StatusOr<std::unique_ptr<NvmeSide>> MakeBlobSide(const std::string& path,
                                                       const Blocks& blocks);

// A file a block, by 8 threads with O_DIRECT: written aside and renamed, one syncfs at the end.
std::unique_ptr<NvmeSide> MakeFilesSide(const std::string& path, const Blocks& blocks);

// redis-server on a unix socket in `path`, with an append-only file there that is synced as told;
// what an earlier one has kept there is loaded, and Read fails with LOADING until it is. 8 commands
// are under way. NOT_FOUND: no redis-server is installed.
enum class RedisSync { kEachSecond, kAlways };
absl::StatusOr<std::unique_ptr<ServerSide>> MakeRedisSide(const std::string& path,
                                                          const Blocks& blocks, RedisSync sync);

// A larderd that has blocks 0 to count - 1 in HOST as one prompt. Read is what a worker does that
// wants them in memory of its own: look the prompt up, copy out of the mapped arena, release.
// UNIMPLEMENTED: Write.
absl::StatusOr<std::unique_ptr<NvmeSide>> MakeHostSide(const DaemonPlace& place, uint32_t count,
                                                       const Blocks& blocks);

}  // namespace larder::bench
