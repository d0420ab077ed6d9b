#include "client/worker/tokenizer.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace larder::worker {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(TokenizerTest, BytesAreTokens) {
  const Tokenizer tokenizer(257);
  const auto tokens = tokenizer.Encode("a\xff\xc3\xa4");
  ASSERT_TRUE(tokens.ok());
  EXPECT_THAT(*tokens, ElementsAre('a', 0xff, 0xc3, 0xa4));
  EXPECT_EQ(tokenizer.Decode(*tokens), "a\xff\xc3\xa4");
  EXPECT_EQ(tokenizer.Decode(std::vector<uint32_t>{'a', 256, 'b'}), "ab");
  EXPECT_EQ(tokenizer.end_token(), 256u);
  EXPECT_EQ(Tokenizer(256).end_token(), std::nullopt);
  EXPECT_TRUE(Tokenizer(256).byte_level());
}

TEST(TokenizerTest, OtherVocabulariesAreGivenIds) {
  const Tokenizer tokenizer(32'000);
  EXPECT_EQ(tokenizer.Encode("a").status().code(), absl::StatusCode::kFailedPrecondition);
  const auto tokens = tokenizer.ParseIds("1, 31999\n 7\t0");
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  EXPECT_THAT(*tokens, ElementsAre(1, 31'999, 7, 0));
  EXPECT_EQ(tokenizer.Decode(*tokens), "1 31999 7 0");
  EXPECT_EQ(tokenizer.end_token(), std::nullopt);
  for (const char* bad : {"32000", "-1", "1 x", "4294967296", "1.5"}) {
    EXPECT_THAT(std::string(tokenizer.ParseIds(bad).status().message()),
                HasSubstr("allowed: 0 to 31999"));
  }
}

}  // namespace
}  // namespace larder::worker
