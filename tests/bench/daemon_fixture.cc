#include "daemon_fixture.h"

#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "storage/check.h"

namespace larder::bench {
v1::ModelSpec BenchSpec(uint64_t block_bytes) {
  const bool small = block_bytes == kBlockBytes;
  v1::ModelSpec spec;
  spec.set_name("bench");
  spec.set_layers(small ? 24 : 32);
  spec.set_kv_heads(small ? 2 : 8);
  spec.set_head_dim(small ? 64 : 128);
  spec.set_dtype(v1::DTYPE_BF16);
  spec.set_block_tokens(kBlockTokens);
  return spec;
}

std::shared_ptr<grpc::Channel> NewChannel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

absl::Status ToStatus(const grpc::Status& status, const std::string& call) {
  if (status.ok()) return absl::OkStatus();
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      absl::StrCat(call, ": ", status.error_message()));
}

absl::StatusOr<std::unique_ptr<DaemonFixture>> DaemonFixture::Start(const DaemonPlace& place,
                                                                    const PromptShape& shape) {
  std::unique_ptr<DaemonFixture> fixture(new DaemonFixture(place.folder, shape));
  const std::string address = "unix:" + fixture->folder_.path() + "/larder.sock";
  absl::StatusOr<std::unique_ptr<Child>> daemon = Child::Start(
      {place.larderd, "--listen=" + address, "--host-bytes=512MiB", "--log-level=error"});
  if (!daemon.ok()) return daemon.status();
  fixture->daemon_ = *std::move(daemon);
  absl::Status status = fixture->Connect(address);
  if (status.ok()) status = fixture->PutPrompt();
  if (!status.ok()) return status;
  return fixture;
}

absl::Status DaemonFixture::Connect(const std::string& address) {
  absl::StatusOr<Client> client = Client::Connect(address);
  if (!client.ok()) return client.status();
  client_ = *std::move(client);
  absl::StatusOr<v1::Model> model = client_->OpenModel(BenchSpec(shape_.block_bytes));
  if (!model.ok()) return model.status();
  model_ = *std::move(model);
  LARDER_CHECK(model_.block_bytes() == shape_.block_bytes);
  absl::StatusOr<Session> session = client_->NewSession("bench");
  if (!session.ok()) return session.status();
  session_ = *std::move(session);
  const std::shared_ptr<grpc::Channel> channel = NewChannel(address);
  kv_ = v1::KvCache::NewStub(channel);
  inspector_ = v1::Inspector::NewStub(channel);
  return absl::OkStatus();
}

absl::Status DaemonFixture::PutPrompt() {
  std::mt19937_64 random(5);
  for (uint32_t i = 0; i < shape_.blocks * kBlockTokens; ++i) {
    prompt_.push_back(static_cast<uint32_t>(random() % 128'000));
  }
  absl::StatusOr<Lease> lease = session_->Lookup(model_, prompt_);
  if (!lease.ok()) return lease.status();
  absl::Status reserved = lease->Reserve(shape_.blocks, v1::TIER_HOST);
  if (!reserved.ok()) return reserved;
  for (uint32_t i = 0; i < shape_.blocks; ++i) {
    const auto block = lease->Reserved(i);
    if (!block.ok()) return block.status();
    for (size_t at = 0; at < block->size(); at += sizeof(uint64_t)) {
      const uint64_t word = random();
      std::memcpy(block->data() + at, &word, sizeof(word));
    }
  }
  const absl::StatusOr<v1::LeaseState> put = lease->Put(prompt_);
  if (!put.ok()) return put.status();
  return lease->Release();
}

}  // namespace larder::bench
