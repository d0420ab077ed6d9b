#include <cstring>
#include <utility>

#include "daemon_fixture.h"
#include "nvme_side.h"
#include "storage/check.h"

namespace larder::bench {
namespace {

class HostSide final : public NvmeSide {
 public:
  HostSide(std::unique_ptr<DaemonFixture> daemon, uint32_t count, const Blocks& blocks)
      : daemon_(std::move(daemon)), count_(count), blocks_(blocks) {}

  absl::Status Write(std::span<const uint32_t>) override {
    return absl::UnimplementedError("the prompt is in HOST from the start");
  }

  absl::Status Read(std::span<const uint32_t> blocks) override {
    absl::StatusOr<Lease> lease = daemon_->session().Lookup(daemon_->model(), daemon_->prompt());
    if (!lease.ok()) return lease.status();
    LARDER_CHECK(lease->end() == count_);
    for (const uint32_t block : blocks) {
      const auto from = lease->Block(block);
      if (!from.ok()) return from.status();
      std::memcpy(blocks_.To(block).data(), from->data(), from->size());
    }
    return lease->Release();
  }

 private:
  const std::unique_ptr<DaemonFixture> daemon_;
  const uint32_t count_;
  const Blocks& blocks_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<NvmeSide>> MakeHostSide(const DaemonPlace& place, uint32_t count,
                                                       const Blocks& blocks) {
  auto daemon = DaemonFixture::Start(place, {blocks.block_bytes(), count});
  if (!daemon.ok()) return daemon.status();
  return std::make_unique<HostSide>(*std::move(daemon), count, blocks);
}

}  // namespace larder::bench
