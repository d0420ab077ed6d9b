// Blocks, and the two sides that every figure of the drive needs: the store and raw io_uring.
#include "nvme_side.h"

#include <fcntl.h>
#include <liburing.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "storage/check.h"
#include "storage/errno_status.h"
#include "storage/unique_fd.h"

namespace larder::bench {

Blocks::Blocks(uint64_t block_bytes) : block_bytes_(block_bytes) {
  auto arena = Arena::Create({.name = "bench", .bytes = kBytes});
  LARDER_CHECK(arena.ok(), "no memory for the blocks");
  arena_ = *std::move(arena);
  std::mt19937_64 random(3);
  for (uint64_t at = 0; at < kBytes; at += sizeof(uint64_t)) {
    const uint64_t word = random();
    std::memcpy(arena_->base() + at, &word, sizeof(word));
  }
}

namespace {

class StoreSide final : public NvmeSide {
 public:
  StoreSide(NvmeStore& store, const Blocks& blocks) : store_(store), blocks_(blocks) {}

  absl::Status Write(std::span<const uint32_t> blocks) override {
    return All(
        blocks, blocks_.count(), [&](uint32_t block, uint64_t memory, NvmeStore::DoneFn done) {
          store_.Write(SlotOf(block), blocks_.From(memory), RecordOf(block), std::move(done));
        });
  }

  absl::Status Read(std::span<const uint32_t> blocks) override {
    return All(blocks, blocks_.read_count(),
               [&](uint32_t block, uint64_t memory, NvmeStore::DoneFn done) {
                 store_.Read(SlotOf(block), blocks_.To(memory), RecordOf(block), std::move(done));
               });
  }

 private:
  using StartFn = std::function<void(uint32_t, uint64_t memory, NvmeStore::DoneFn)>;

  Slot SlotOf(uint32_t block) const { return Slot::AtOffset(block * blocks_.block_bytes()); }

  static BlockRecord RecordOf(uint32_t block) {
    BlockRecord record;
    std::memcpy(record.key.bytes.data(), &block, sizeof(block));
    record.key.bytes[31] = 1;
    record.model_id = 1;
    return record;
  }

  // As StorageMover does it: whoever is told of a block that is done starts the next. A block's
  // memory belongs to its operation until then.
  absl::Status All(std::span<const uint32_t> blocks, uint64_t memories, const StartFn& start) {
    absl::Mutex mu;
    absl::Status result;
    size_t next = 0;
    size_t done = 0;
    const std::function<void(uint64_t)> start_next = [&](uint64_t memory) {
      uint32_t block;
      {
        const absl::MutexLock lock(&mu);
        if (next == blocks.size()) return;
        block = blocks[next++];
      }
      start(block, memory, [&, memory](const absl::Status& status) {
        start_next(memory);
        const absl::MutexLock lock(&mu);
        result.Update(status);
        ++done;
      });
    };
    for (uint64_t memory = 0; memory < memories; ++memory) start_next(memory);
    const auto all_done = [&] { return done == blocks.size(); };
    const absl::MutexLock lock(&mu);
    mu.Await(absl::Condition(&all_done));
    return result;
  }

  NvmeStore& store_;
  const Blocks& blocks_;
};

class RawSide final : public NvmeSide {
 public:
  RawSide(UniqueFd file, const Blocks& blocks) : file_(std::move(file)), blocks_(blocks) {}
  ~RawSide() override {
    if (open_) io_uring_queue_exit(&ring_);
  }

  absl::Status Open() {
    const int error = io_uring_queue_init(kDepth, &ring_, 0);
    if (error < 0) return ErrnoStatus("io_uring", -error);
    open_ = true;
    const iovec all{blocks_.all().data(), blocks_.all().size()};
    if (const int refused = io_uring_register_buffers(&ring_, &all, 1); refused < 0) {
      return ErrnoStatus("registering the buffers", -refused);
    }
    return absl::OkStatus();
  }

  absl::Status Write(std::span<const uint32_t> blocks) override {
    absl::Status status = All(blocks, /*write=*/true);
    if (status.ok() && ::fdatasync(file_.get()) != 0) status = ErrnoStatus("fdatasync", errno);
    return status;
  }
  absl::Status Read(std::span<const uint32_t> blocks) override {
    return All(blocks, /*write=*/false);
  }

 private:
  static constexpr uint32_t kDepth = 32;
  static constexpr uint64_t kBytesUnderWay = 16 << 20;

  void Start(uint32_t block, uint32_t memory, bool write) {
    io_uring_sqe* const sqe = io_uring_get_sqe(&ring_);
    const auto length = static_cast<unsigned>(blocks_.block_bytes());
    const uint64_t offset = block * blocks_.block_bytes();
    if (write) {
      io_uring_prep_write_fixed(sqe, file_.get(), blocks_.From(memory).data(), length, offset, 0);
    } else {
      io_uring_prep_read_fixed(sqe, file_.get(), blocks_.To(memory).data(), length, offset, 0);
    }
    io_uring_sqe_set_data64(sqe, memory);
  }

  absl::Status All(std::span<const uint32_t> blocks, bool write) {
    const uint64_t depth = std::min<uint64_t>(kDepth, kBytesUnderWay / blocks_.block_bytes());
    std::vector<uint32_t> free(write ? blocks_.count() : blocks_.read_count());
    std::iota(free.begin(), free.end(), 0);
    size_t next = 0;
    size_t under_way = 0;
    absl::Status status;
    while (next < blocks.size() || under_way > 0) {
      for (; next < blocks.size() && under_way < depth; ++under_way) {
        Start(blocks[next++], free.back(), write);
        free.pop_back();
      }
      if (const int n = io_uring_submit_and_wait(&ring_, 1); n < 0) {
        return ErrnoStatus("io_uring_enter", -n);
      }
      io_uring_cqe* cqe = nullptr;
      for (; io_uring_peek_cqe(&ring_, &cqe) == 0; --under_way) {
        free.insert(free.begin(), static_cast<uint32_t>(io_uring_cqe_get_data64(cqe)));
        if (cqe->res != static_cast<int>(blocks_.block_bytes())) {
          status = absl::UnavailableError(absl::StrCat("a raw operation returned ", cqe->res));
        }
        io_uring_cqe_seen(&ring_, cqe);
      }
    }
    return status;
  }

  const UniqueFd file_;
  const Blocks& blocks_;
  io_uring ring_{};
  bool open_ = false;
};

}  // namespace

std::unique_ptr<NvmeSide> MakeStoreSide(NvmeStore& store, const Blocks& blocks) {
  return std::make_unique<StoreSide>(store, blocks);
}

absl::StatusOr<std::unique_ptr<NvmeSide>> MakeRawSide(const std::string& path,
                                                      const Blocks& blocks) {
  UniqueFd file(::open(path.c_str(), O_RDWR | O_CREAT | O_DIRECT | O_CLOEXEC, 0600));
  if (!file) return ErrnoStatus(absl::StrCat(path, ": opening it with O_DIRECT"), errno);
  auto side = std::make_unique<RawSide>(std::move(file), blocks);
  if (absl::Status status = side->Open(); !status.ok()) return status;
  return side;
}

}  // namespace larder::bench
