// CacheSession: the worker's way to its larderd, which may be away for a while.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. A daemon that is gone costs one failed attempt, and then none until a pause is over: 100 ms
//      at first, doubling up to 5 s.
//   2. Leases of a session that was lost stay readable: they keep its mappings (session.h).
//   3. A daemon that drains is left at the next Tend, so that it need not wait for this worker.
//   4. Who computes on a GPU has a session only with a daemon whose GPU tier is in that GPU's
//      memory and open here: all else is memory that its kernels cannot touch.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/client.h"
#include "client/worker/block_memory.h"
#include "client/worker/kv_geometry.h"
#include "larder/v1/types.pb.h"

namespace larder::worker {

struct CacheOptions {
  std::string address;                        // unix:PATH or HOST:PORT
  absl::Duration timeout = absl::Seconds(1);  // of the connection and of each call
  bool publish = true;                        // what is computed is put into the cache
  // How much longer than computing a restore may take, as a part of computing (restore.h). More
  // saves the processor work; less, the first token time.
  double restore_patience = 0.1;
  // Not zero: before its result is given, a sample waits until what it published survives a
  // restart, at most so long; everything else waits with it.
  absl::Duration flush;
  std::string worker = "larder-worker";  // a name for people
};

// "GPU-...", as larderd's --gpu=cuda:DEVICE takes it and nvidia-smi -L says it.
std::string DeviceName(const DeviceUuid& uuid);

// What the daemon knows these blocks by. The name is the architecture's, not a path's: equal
// weights are one model wherever they lie.
v1::ModelSpec SpecOf(std::string_view name, const KvGeometry& geometry);

class CacheSession {
 public:
  using Notice = std::function<void(std::string_view)>;

  // Tries to attach; whether it worked, lost() and the first Lookup tell. `device`: the GPU that
  // computes; nothing: the CPU does.
  CacheSession(CacheOptions options, v1::ModelSpec spec, std::optional<DeviceUuid> device,
               Notice on_notice);

  // Leases the longest cached prefix, possibly of nothing. UNAVAILABLE while there is no daemon;
  // FAILED_PRECONDITION while that has no GPU tier for the device; other errors as Session::Lookup.
  absl::StatusOr<Lease> Lookup(std::span<const uint32_t> tokens, const LookupOptions& options);

  // Notices a lost session, and leaves a daemon that is stopping.
  void Tend();

  bool attached() const { return session_.has_value() && session_->Alive(); }
  const absl::Status& lost() const { return lost_; }  // OK: there is a session
  const CacheOptions& options() const { return options_; }

 private:
  absl::Status Attach();
  absl::Status CheckDevice(const Session& session) const;
  void Detach(const absl::Status& why);
  void Pause();

  const CacheOptions options_;
  const v1::ModelSpec spec_;
  const std::string device_;  // as DeviceArena names it; empty: the CPU
  const Notice on_notice_;

  std::optional<Client> client_;
  std::optional<Session> session_;
  v1::Model model_;
  absl::Status lost_;  // why there is no session
  absl::Time next_attempt_ = absl::InfinitePast();
  absl::Duration pause_;
};

}  // namespace larder::worker
