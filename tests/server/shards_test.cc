// A model of two shards through the services: bytes inline and over the wire are whole blocks,
// the parts of all ranks in order.
#include <gtest/gtest.h>

#include <cstring>

#include "proto/larder/v1/handover.h"
#include "test_server.h"

namespace larder {
namespace {

class ShardsTest : public testing::Test {
 protected:
  v1::ModelSpec Spec(uint32_t shards, uint32_t kv_heads) {
    v1::ModelSpec spec = SmallSpec("sharded");
    spec.set_kv_heads(kv_heads);
    spec.set_shards(shards);
    return spec;
  }
  static grpc::Status Open(TestServer& server, const v1::ModelSpec& spec, v1::Model& model) {
    grpc::ClientContext context;
    v1::OpenModelRequest request;
    *request.mutable_spec() = spec;
    return server.kv().OpenModel(&context, request, &model);
  }
  void SetUp() override {
    ASSERT_GRPC_OK(Open(server_, Spec(2, 2), model_));
    ASSERT_EQ(model_.block_bytes(), kBlockBytes);
  }
  // Both parts of each block: every second of BlockData's "blocks" is the second rank's.
  static std::string Whole(uint32_t blocks) { return BlockData(2 * blocks); }
  static std::string Part(uint32_t position, uint32_t rank) {
    return BlockData(1, 1, 2 * position + rank);
  }
  grpc::Status PutInline(const std::string& data) {
    v1::PutRequest request;
    request.set_model_id(model_.model_id());
    const auto tokens = Tokens(3);
    request.mutable_tokens()->Add(tokens.begin(), tokens.end());
    request.set_data(data);
    grpc::ClientContext context;
    v1::LeaseState state;
    return server_.kv().Put(&context, request, &state);
  }
  std::string Download(TestServer& server) {
    v1::DownloadRequest request;
    request.mutable_blocks()->set_model_id(model_.model_id());
    const auto tokens = Tokens(3);
    request.mutable_blocks()->mutable_tokens()->Add(tokens.begin(), tokens.end());
    grpc::ClientContext context;
    const auto stream = server.kv().Download(&context, request);
    v1::DownloadChunk chunk;
    std::string data;
    while (stream->Read(&chunk)) {
      EXPECT_EQ(chunk.block_bytes(), 2 * kBlockBytes);
      EXPECT_EQ(chunk.position() * 2 * kBlockBytes + chunk.offset(), data.size());
      data += chunk.data();
    }
    const grpc::Status status = stream->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    return data;
  }

  TestServer server_;
  v1::Model model_;
};

TEST_F(ShardsTest, InlineBytesAreWholeBlocks) {
  EXPECT_STATUS(PutInline(BlockData(3)), INVALID_ARGUMENT,
                "data: 12288 bytes given, 24576 needed: 3 blocks of 8192");
  ASSERT_GRPC_OK(PutInline(Whole(3)));
  EXPECT_EQ(Download(server_), Whole(3));
}

// The lead reserves and puts; each rank writes its own part in place.
TEST_F(ShardsTest, EachRankWritesItsPart) {
  for (const v1::Tier tier : {v1::TIER_GPU, v1::TIER_HOST}) {
    TestServer server;
    v1::Model model;
    ASSERT_GRPC_OK(Open(server, Spec(2, 2), model));
    TestWorker lead(server);
    const uint64_t lease = lead.Lookup(model_.model_id(), Tokens(3));
    const v1::ReserveResponse reserved = lead.Reserve(lease, 0, 3, tier);
    for (const v1::Run& run : reserved.runs()) {
      EXPECT_EQ(run.arena(), tier == v1::TIER_GPU ? 0u : wire::kHostArena);
      for (int i = 0; i < run.offsets_size(); ++i) {
        for (uint32_t rank = 0; rank < 2; ++rank) {
          std::memcpy(server.At(run, i, rank), Part(run.position() + i, rank).data(), kBlockBytes);
        }
      }
    }
    lead.Put(lease, 0, Tokens(3));
    // Of blocks that are in GPU alone, too: the daemon puts the parts together.
    EXPECT_EQ(Download(server), Whole(3));
    lead.Release(lease);
  }
}

TEST_F(ShardsTest, ThroughEveryTierAndBack) {
  ASSERT_GRPC_OK(PutInline(Whole(3)));
  server_.mover().AwaitIdle();
  server_.cache().Evict(Tier::kHost, 0, 100);
  TestWorker lead(server_);
  uint32_t matched = 0;
  const uint64_t lease = lead.Lookup(model_.model_id(), Tokens(3), &matched);
  ASSERT_EQ(matched, 3 * kBlockTokens);
  v1::PrefetchRequest request;
  request.mutable_blocks()->set_session_id(lead.session());
  request.mutable_blocks()->set_lease_id(lease);
  request.set_tier(v1::TIER_GPU);
  grpc::ClientContext context;
  const auto stream = server_.kv().Prefetch(&context, request);
  v1::PrefetchEvent event;
  uint32_t blocks = 0;
  while (stream->Read(&event)) {
    for (const v1::Run& run : event.runs()) {
      EXPECT_EQ(run.tier(), v1::TIER_GPU);
      for (int i = 0; i < run.offsets_size(); ++i, ++blocks) {
        for (uint32_t rank = 0; rank < 2; ++rank) {
          const std::string part = Part(run.position() + i, rank);
          EXPECT_EQ(std::memcmp(server_.At(run, i, rank), part.data(), kBlockBytes), 0)
              << "block " << run.position() + i << ", rank " << rank;
        }
      }
    }
  }
  ASSERT_GRPC_OK(stream->Finish());
  EXPECT_EQ(blocks, 3u);
}

TEST_F(ShardsTest, BoundsAreNamed) {
  v1::Model model;
  EXPECT_STATUS(Open(server_, Spec(3, 4), model), INVALID_ARGUMENT,
                "spec.kv_heads: 4 given, must be a multiple of shards, 3");
  EXPECT_STATUS(Open(server_, Spec(4, 4), model), INVALID_ARGUMENT,
                "spec.shards: 4 given, allowed are 1 to 2, the ranks of this daemon's GPU tier");
  EXPECT_STATUS(Open(server_, Spec(17, 17), model), INVALID_ARGUMENT,
                "spec.shards: 17 given, allowed are 1 to 16");
}

}  // namespace
}  // namespace larder
