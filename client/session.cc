#include "client/session.h"

#include <utility>

#include "client/lease.h"
#include "client/session_state.h"

namespace larder {
inline namespace client {
namespace {

absl::Status NotHeld() { return absl::FailedPreconditionError("this Session was moved from"); }

}  // namespace

Session::Session(std::shared_ptr<SessionState> state) : state_(std::move(state)) {}
Session::Session(Session&&) noexcept = default;

Session& Session::operator=(Session&& other) noexcept {
  if (this == &other) return *this;
  if (state_ != nullptr) state_->Close();
  state_ = std::move(other.state_);
  return *this;
}

Session::~Session() {
  if (state_ != nullptr) state_->Close();
}

uint64_t Session::id() const { return state_ == nullptr ? 0 : state_->id(); }
uint64_t Session::boot_id() const { return state_ == nullptr ? 0 : state_->boot_id(); }
Group Session::group() const { return state_ == nullptr ? Group() : state_->group(); }
absl::Status Session::Health() const { return state_ == nullptr ? NotHeld() : state_->Health(); }
bool Session::Draining() const { return state_ != nullptr && state_->draining(); }

absl::StatusOr<Lease> Session::Lookup(const v1::Model& model, std::span<const uint32_t> tokens,
                                      const LookupOptions& options) const {
  if (state_ == nullptr) return NotHeld();
  Lease lease(state_, model);
  if (absl::Status looked = lease.LookupFurther(tokens, options); !looked.ok()) return looked;
  return lease;
}

std::span<std::byte> Session::Arena(uint32_t arena) const {
  return state_ == nullptr ? std::span<std::byte>() : state_->ArenaBytes(arena);
}

absl::StatusOr<DeviceArena> Session::Device(uint32_t arena) const {
  if (state_ == nullptr) return NotHeld();
  return state_->DeviceArenaOf(arena);
}

bool Session::HasDeviceArenas() const { return state_ != nullptr && state_->HasDeviceArenas(); }

}  // namespace client
}  // namespace larder
