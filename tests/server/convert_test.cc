#include "server/rpc/convert.h"

#include <gtest/gtest.h>

#include "proto/larder/v1/handover.h"
#include "server/rpc/status.h"
#include "test_server.h"

namespace larder {
namespace {

TEST(Convert, TiersHaveTheWiresNumbers) {
  EXPECT_EQ(FromProto(v1::TIER_UNSPECIFIED), std::nullopt);
  for (const Tier tier : kTiers) EXPECT_EQ(FromProto(ToProto(tier)), tier);
  EXPECT_EQ(ToProto(Tier::kGpu), v1::TIER_GPU);
  EXPECT_EQ(ToProto(Tier::kHost), v1::TIER_HOST);
  EXPECT_EQ(ToProto(Tier::kNvme), v1::TIER_NVME);
}

TEST(Convert, RunsBecomeArenaAndOffsets) {
  const std::vector<SlotRun> runs = {{Tier::kGpu, 0, {Slot(1), Slot(3)}},
                                     {Tier::kHost, 2, {Slot(2)}},
                                     {Tier::kNvme, 3, {Slot(7), Slot(8)}}};
  google::protobuf::RepeatedPtrField<v1::Run> out;
  ToProto(runs, out);
  ASSERT_EQ(out.size(), 3);
  EXPECT_EQ(out[0].tier(), v1::TIER_GPU);
  EXPECT_EQ(out[0].arena(), 0u);
  EXPECT_EQ(out[0].offsets(0), 0u);
  EXPECT_EQ(out[0].offsets(1), 8192u);
  EXPECT_EQ(out[1].arena(), wire::kHostArena);
  EXPECT_EQ(out[1].position(), 2u);
  EXPECT_EQ(out[1].offsets(0), 4096u);
  EXPECT_EQ(out[2].blocks(), 2u);
  EXPECT_EQ(out[2].offsets_size(), 0) << "NVME blocks have no address";
}

TEST(Convert, SpecSurvivesBothWays) {
  v1::ModelSpec spec = SmallSpec();
  spec.set_lora("adapter");
  spec.set_salt(std::string("\0\xff", 2));
  spec.set_weights_revision("abc");
  const absl::StatusOr<Model> model = MakeModel(FromProto(spec));
  ASSERT_TRUE(model.ok());
  v1::Model out;
  ToProto(*model, out);
  spec.set_shards(1);  // 0 is read as 1
  EXPECT_EQ(out.spec().SerializeAsString(), spec.SerializeAsString());
  EXPECT_EQ(out.fingerprint().size(), 32u);
  EXPECT_EQ(out.block_bytes(), kBlockBytes);
}

TEST(Convert, StatusKeepsCodeAndMessage) {
  const grpc::Status status = ToGrpc(absl::AbortedError("position: 3 given"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(status.error_message(), "position: 3 given");
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
}

}  // namespace
}  // namespace larder
