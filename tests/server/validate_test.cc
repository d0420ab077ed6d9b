#include "server/rpc/validate.h"

#include <gtest/gtest.h>

#include <cmath>

namespace larder {
namespace {

void Expect(const absl::Status& status, absl::string_view message) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), message);
}

TEST(Validate, OpenModel) {
  v1::OpenModelRequest request;
  Expect(Validate(request), "spec: missing");
  request.mutable_spec()->set_dtype(static_cast<v1::DType>(17));
  EXPECT_NE(Validate(request).message().find("spec.dtype: 17 given, allowed are DTYPE_F32 (1)"),
            absl::string_view::npos);
  request.mutable_spec()->set_dtype(v1::DTYPE_I8);
  EXPECT_TRUE(Validate(request).ok());
}

TEST(Validate, Attach) {
  v1::AttachRequest request;
  request.set_worker(std::string(128, 'w'));
  EXPECT_TRUE(Validate(request).ok());
  request.set_worker(std::string(129, 'w'));
  Expect(Validate(request), "worker: 129 bytes given, at most 128");
}

TEST(Validate, Lookup) {
  v1::LookupPrefixRequest request;
  request.mutable_tokens()->Resize(kTokensMax, 1);
  EXPECT_TRUE(Validate(request).ok());
  request.mutable_tokens()->Resize(kTokensMax + 1, 1);
  Expect(Validate(request), "tokens: 1048577 given, at most 1048576");
  request.clear_tokens();
  for (const double rate : {-1.0, std::nan(""), HUGE_VAL}) {
    request.set_prefill_tokens_per_second(rate);
    EXPECT_NE(Validate(request).message().find("prefill_tokens_per_second"),
              absl::string_view::npos);
  }
  request.clear_prefill_tokens_per_second();
  request.set_peek(true);
  request.set_lease_id(5);
  Expect(Validate(request), "lease_id: 5 given, none allowed with peek");
}

TEST(Validate, Prefetch) {
  v1::PrefetchRequest request;
  Expect(Validate(request), "blocks: missing");
  request.mutable_blocks()->set_lease_id(1);
  EXPECT_TRUE(Validate(request).ok());
  request.set_tier(v1::TIER_NVME);
  Expect(Validate(request), "tier: 3 given, allowed are TIER_GPU (1), TIER_HOST (2)");
  request.set_tier(static_cast<v1::Tier>(9));
  Expect(Validate(request), "tier: 9 given, allowed are TIER_GPU (1), TIER_HOST (2)");
  request.set_tier(v1::TIER_GPU);
  request.set_policy(v1::PREFETCH_POLICY_TIMEOUT);
  Expect(Validate(request), "timeout_ms: 0 given, allowed are 1 to 3600000");
  request.set_timeout_ms(3'600'001);
  Expect(Validate(request), "timeout_ms: 3600001 given, allowed are 1 to 3600000");
  request.set_policy(v1::PREFETCH_POLICY_BEST_EFFORT);
  Expect(Validate(request), "timeout_ms: 3600001 given, only with PREFETCH_POLICY_TIMEOUT");
  request.set_policy(static_cast<v1::PrefetchPolicy>(8));
  EXPECT_NE(Validate(request).message().find("policy: 8 given"), absl::string_view::npos);
  request.clear_policy();
  request.clear_timeout_ms();
  request.mutable_blocks()->add_tokens(1);
  Expect(Validate(request), "blocks.tokens: 1 given, none allowed beside lease_id");
}

TEST(Validate, Reserve) {
  v1::ReserveRequest request;
  Expect(Validate(request), "count: 0 given, allowed are 1 to 65536");
  request.set_count(65'537);
  Expect(Validate(request), "count: 65537 given, allowed are 1 to 65536");
  request.set_count(65'536);
  EXPECT_TRUE(Validate(request).ok());
}

TEST(Validate, Put) {
  v1::PutRequest request;
  Expect(Validate(request), "tokens: 0 given, allowed are 1 to 1048576");
  request.mutable_tokens()->Resize(16, 1);
  Expect(Validate(request), "data: 0 bytes given, needed in a Put without lease_id");
  request.set_lease_id(1);
  EXPECT_TRUE(Validate(request).ok());
  request.add_prefix(1);
  Expect(Validate(request), "prefix: 1 given, none allowed beside lease_id");
}

TEST(Validate, PutInline) {
  Model model;
  model.block_bytes = 100;
  model.spec.block_tokens = 16;
  v1::PutRequest request;
  request.mutable_tokens()->Resize(17, 1);
  Expect(ValidateInline(request, model), "tokens: 17 given, whole blocks of 16 needed");
  request.mutable_tokens()->Resize(32, 1);
  request.set_data("abc");
  Expect(ValidateInline(request, model), "data: 3 bytes given, 200 needed: 2 blocks of 100");
  request.set_data(std::string(200, 'x'));
  EXPECT_TRUE(ValidateInline(request, model).ok());
  model.spec.shards = 4;
  Expect(ValidateInline(request, model), "data: 200 bytes given, 800 needed: 2 blocks of 400");
  model.spec.shards = 1;
  request.set_position(2);
  Expect(ValidateInline(request, model),
         "prefix: 0 given, 32 tokens needed: position 2 times 16");
  request.set_position(0xFFFFFFFF);
  EXPECT_FALSE(ValidateInline(request, model).ok());
}

TEST(Validate, TheRest) {
  v1::DownloadRequest download;
  Expect(Validate(download), "blocks: missing");
  v1::ExplainRequest explain;
  explain.mutable_tokens()->Resize(kTokensMax + 1, 1);
  Expect(Validate(explain), "tokens: 1048577 given, at most 1048576");
  v1::TopPrefixesRequest top;
  top.set_count(1001);
  Expect(Validate(top), "count: 1001 given, at most 1000");
  v1::EvictRequest evict;
  evict.set_tier(static_cast<v1::Tier>(4));
  EXPECT_NE(Validate(evict).message().find("tier: 4 given"), absl::string_view::npos);
  v1::EchoRequest echo;
  echo.set_response_bytes((64 << 20) + 1);
  Expect(Validate(echo), "response_bytes: 67108865 given, at most 67108864");
}

}  // namespace
}  // namespace larder
