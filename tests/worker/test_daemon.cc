#include "tests/worker/test_daemon.h"

#include <stdlib.h>

#include <filesystem>
#include <utility>

#include "gtest/gtest.h"

namespace larder::worker {
namespace {

constexpr uint64_t kLeaseId = 7;
constexpr uint32_t kReservedBehind = 16;  // blocks

std::string TemporaryDirectory() {
  std::string pattern = testing::TempDir() + "larder_worker_XXXXXX";
  return mkdtemp(pattern.data());
}

}  // namespace

TestDaemon::TestDaemon() : directory_(TemporaryDirectory()) {
  Restart();
  address_ = daemon_->address();
}

TestDaemon::~TestDaemon() {
  session_.reset();
  client_.reset();
  daemon_.reset();
  std::filesystem::remove_all(directory_);
}

CacheOptions TestDaemon::options() const {
  CacheOptions options;
  options.address = address_;
  options.timeout = absl::Seconds(10);
  return options;
}

void TestDaemon::AnswerLookup(uint32_t host, uint32_t nvme) {
  v1::LookupPrefixResponse found;
  found.set_lease_id(kLeaseId);
  found.set_matched_tokens((host + nvme) * kBlockTokens);
  std::vector<uint64_t> offsets;
  for (uint32_t i = 0; i < host; ++i) offsets.push_back(i * kBlockBytes);
  *found.add_runs() = FakeDaemon::HostRun(0, offsets);
  v1::Run& cold = *found.add_runs();
  cold.set_tier(v1::TIER_NVME);
  cold.set_position(host);
  cold.set_blocks(nvme);
  fake().AnswerLookup(found);
}

Lease TestDaemon::LookUp(uint32_t host, uint32_t nvme) {
  AnswerLookup(host, nvme);
  if (!client_.has_value()) {
    client_ = *Client::Connect(address_);
    session_ = *client_->NewSession("test");
  }
  const std::vector<uint32_t> tokens((host + nvme) * kBlockTokens + 1);
  return *session_->Lookup(FakeDaemon::Model(), tokens);
}

void TestDaemon::AnswerReserve(uint32_t position, uint32_t count) {
  v1::ReserveResponse answer;
  for (uint32_t i = position; i < position + count; ++i) {
    *answer.add_runs() = FakeDaemon::HostRun(i, {(kReservedBehind + i) * kBlockBytes});
  }
  fake().AnswerReserve(answer);
}

void TestDaemon::AnswerState(uint32_t end, uint32_t reserved) {
  v1::LeaseState state;
  state.set_lease_id(kLeaseId);
  state.set_end(end);
  state.set_reserved_blocks(reserved);
  fake().AnswerState(state);
}

}  // namespace larder::worker
