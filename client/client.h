// Client: a process's way to a larderd. Sessions (session.h) and leases (lease.h) come from it.
//
//   absl::StatusOr<larder::Client> client = larder::Client::Connect();
//   absl::StatusOr<larder::v1::Model> model = client->OpenModel(spec);
//   absl::StatusOr<larder::Session> session = client->NewSession("worker 0");
//   absl::StatusOr<larder::Lease> lease = session->Lookup(*model, prompt);
//
// Thread safety: Client is thread-safe, except for moves and destruction.
//
// Invariants:
//   1. Every call ends: with its answer, or with an error by its deadline. Nothing throws.
//   2. A Client outlives restarts of the daemon: calls fail with UNAVAILABLE while it is away
//      and work again when it is back. Sessions do not: open a new one.
//   3. Errors are those of the .proto files, plus UNAVAILABLE (nobody answers) and
//      DEADLINE_EXCEEDED (the answer did not come in time; the call may have taken effect).
//
// The inline namespace keeps these types apart from the server's of the same name: the
// command `larder` links both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "client/lease.h"
#include "client/session.h"
#include "larder/v1/inspector.pb.h"
#include "larder/v1/kv_cache.pb.h"
#include "larder/v1/types.pb.h"

namespace larder {
inline namespace client {

class Rpc;

struct ClientOptions {
  absl::Duration call_timeout = absl::Seconds(5);  // of every call, unless it takes its own
  absl::Duration connect_timeout = absl::Seconds(5);
};

// $LARDER_ADDRESS where that is set, else unix:/run/larder/larderd.sock.
std::string DefaultAddress();

class Client {
 public:
  // `address`: unix:PATH, unix-abstract:NAME or HOST:PORT; empty: DefaultAddress().
  // UNAVAILABLE when nobody answers there.
  static absl::StatusOr<Client> Connect(std::string_view address = {},
                                        const ClientOptions& options = {});

  Client(Client&&) noexcept;
  Client& operator=(Client&&) noexcept;
  ~Client();

  // Idempotent. The fields of the answer are what Session::Lookup needs.
  absl::StatusOr<v1::Model> OpenModel(const v1::ModelSpec& spec) const;
  // NOT_FOUND when no model of this id is open.
  absl::StatusOr<v1::Model> FindModel(uint64_t model_id) const;

  // A new session: attached, and its arenas mapped unless the options say otherwise. `worker`
  // is a name for people, at most 128 bytes.
  absl::StatusOr<Session> NewSession(std::string_view worker,
                                     const SessionOptions& options = {}) const;

  // --- Without a session ---------------------------------------------------------------

  // What a lookup would find; pins nothing, so the answer is a hint.
  absl::StatusOr<v1::LookupPrefixResponse> Peek(uint64_t model_id,
                                                std::span<const uint32_t> tokens) const;
  absl::StatusOr<PrefetchResult> Prefetch(uint64_t model_id, std::span<const uint32_t> tokens,
                                          const PrefetchOptions& options = {},
                                          const PrefetchCallback& on_event = {}) const;
  // Puts `data`, block after block, as the K/V of `tokens` (whole blocks) after `prefix`
  // (whole blocks, cached).
  absl::StatusOr<v1::LeaseState> Put(const v1::Model& model, std::span<const uint32_t> prefix,
                                     std::span<const uint32_t> tokens,
                                     std::span<const std::byte> data) const;
  // The cached blocks of the prefix, from block `position`, at most `count` (0: all).
  absl::Status Download(uint64_t model_id, std::span<const uint32_t> tokens, uint32_t position,
                        uint32_t count, absl::Duration timeout,
                        const DownloadCallback& on_chunk) const;

  // --- Inspector -----------------------------------------------------------------------

  absl::StatusOr<v1::Status> GetStatus() const;
  absl::StatusOr<v1::ListModelsResponse> ListModels() const;
  absl::StatusOr<v1::ListSessionsResponse> ListSessions(bool leases) const;
  absl::StatusOr<v1::ExplainResponse> Explain(uint64_t model_id,
                                              std::span<const uint32_t> tokens) const;
  absl::StatusOr<v1::TopPrefixesResponse> TopPrefixes(uint64_t model_id, uint32_t count) const;
  absl::StatusOr<v1::EvictResponse> Evict(v1::Tier tier, uint64_t model_id, uint64_t blocks) const;
  // What a call costs: `request_bytes` there, `response_bytes` back.
  absl::StatusOr<v1::EchoResponse> Echo(const v1::EchoRequest& request) const;

  const std::string& address() const;

 private:
  explicit Client(std::shared_ptr<Rpc> rpc);

  // Shared, because sessions may outlive the Client that opened them.
  std::shared_ptr<Rpc> rpc_;
};

}  // namespace client
}  // namespace larder
