// A larderd with one prompt in its HOST tier, and a worker attached to it.
//
// Thread safety: none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "child.h"
#include "client/client.h"
#include "grpcpp/grpcpp.h"
#include "larder/v1/inspector.grpc.pb.h"
#include "larder/v1/kv_cache.grpc.pb.h"

namespace larder::bench {

// Qwen2.5-0.5B in bf16: 16 tokens are 192 KiB.
inline constexpr uint32_t kBlockTokens = 16;
inline constexpr uint64_t kBlockBytes = 192 << 10;
inline constexpr uint32_t kBlocks = 512;  // 8,192 tokens, 96 MiB

struct DaemonPlace {
  std::string larderd;  // the program
  std::string folder;   // where temporary folders go; on the drive that is measured
};

// What the prompt is made of.
struct PromptShape {
  uint64_t block_bytes = kBlockBytes;  // or 2 MiB: Llama-3-8B in bf16
  uint32_t blocks = kBlocks;
};

class DaemonFixture {
 public:
  static absl::StatusOr<std::unique_ptr<DaemonFixture>> Start(const DaemonPlace& place,
                                                              const PromptShape& shape = {});

  const std::vector<uint32_t>& prompt() const { return prompt_; }
  const v1::Model& model() const { return model_; }
  const Session& session() const { return *session_; }
  const std::string& folder() const { return folder_.path(); }
  v1::KvCache::Stub& kv() { return *kv_; }
  v1::Inspector::Stub& inspector() { return *inspector_; }

 private:
  DaemonFixture(const std::string& folder, const PromptShape& shape)
      : shape_(shape), folder_(folder) {}
  absl::Status Connect(const std::string& address);
  absl::Status PutPrompt();

  const PromptShape shape_;
  // In this order, so that the worker leaves before the daemon goes.
  TemporaryFolder folder_;
  std::unique_ptr<Child> daemon_;
  std::optional<Client> client_;
  std::optional<Session> session_;
  std::unique_ptr<v1::KvCache::Stub> kv_;
  std::unique_ptr<v1::Inspector::Stub> inspector_;
  v1::Model model_;
  std::vector<uint32_t> prompt_;
};

// The model whose blocks have this size.
v1::ModelSpec BenchSpec(uint64_t block_bytes);

// A channel of its own to the server at `address`, any message size.
std::shared_ptr<grpc::Channel> NewChannel(const std::string& address);

absl::Status ToStatus(const grpc::Status& status, const std::string& call);

}  // namespace larder::bench
