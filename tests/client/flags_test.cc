#include "client/flags.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "CLI/CLI.hpp"
#include "client/commands.h"
#include "client/names.h"
#include "client/prompt_flags.h"

namespace larder::cli {
namespace {

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

TEST(ParseNumber, TakesDigitsInBounds) {
  EXPECT_EQ(*ParseNumber("0", 0, 5), 0u);
  EXPECT_EQ(*ParseNumber("5", 0, 5), 5u);
  EXPECT_EQ(*ParseNumber("18446744073709551615", 0, ~uint64_t{0}), ~uint64_t{0});
  for (const char* bad : {"", "6", "-1", "+1", " 1", "1.0", "0x1", "99999999999999999999"}) {
    EXPECT_EQ(ParseNumber(bad, 0, 5).status(),
              absl::InvalidArgumentError("\"" + std::string(bad) +
                                         "\" must be a whole number from 0 to 5"));
  }
}

TEST(ParseReal, TakesNumbersInBounds) {
  EXPECT_EQ(*ParseReal("0.25", 0, 1), 0.25);
  EXPECT_EQ(*ParseReal("1e0", 0, 1), 1);
  for (const char* bad : {"", "1.01", "-0.1", "nan", "inf", "1x"}) {
    EXPECT_EQ(
        ParseReal(bad, 0, 1).status(),
        absl::InvalidArgumentError("\"" + std::string(bad) + "\" must be a number from 0 to 1"));
  }
}

TEST(AddBytes, TakesSizesFromAMinimum) {
  CLI::App app;
  uint64_t value = 0;
  AddBytes(app, "--pool", value, 2048, "");
  app.parse("--pool 512MiB");
  EXPECT_EQ(value, uint64_t{512} << 20);
  for (const std::string bad : {"1KiB", "1MB", "-1"}) {
    try {
      app.parse("--pool " + bad);
      ADD_FAILURE() << bad;
    } catch (const CLI::ValidationError& error) {
      EXPECT_EQ(std::string(error.what()),
                "--pool: \"" + bad + "\" must be a size like 512MiB or 8GiB, at least 2048");
    }
  }
}

TEST(ParseDuration, TakesUnitsAndSeconds) {
  EXPECT_EQ(*ParseDuration("250ms"), absl::Milliseconds(250));
  EXPECT_EQ(*ParseDuration("1m30s"), absl::Seconds(90));
  EXPECT_EQ(*ParseDuration("2"), absl::Seconds(2));
  EXPECT_EQ(*ParseDuration("0.5"), absl::Milliseconds(500));
  for (const char* bad : {"", "0", "-1s", "5 apples", "25h", "inf", "nan"}) {
    EXPECT_FALSE(ParseDuration(bad).ok()) << bad;
  }
}

TEST(ParseId, TakesHex) {
  EXPECT_EQ(*ParseId("00000000000000ff"), 255u);
  EXPECT_EQ(*ParseId("FFFFFFFFFFFFFFFF"), ~uint64_t{0});
  for (const char* bad : {"", "0", "xyz", "0x10", "00000000000000001"}) {
    EXPECT_FALSE(ParseId(bad).ok()) << bad;
  }
}

TEST(ParseTokens, TakesCommasSpacesAndLines) {
  EXPECT_EQ(*ParseTokens("1,2, 3\n4\t5,\n", "--tokens", false),
            (std::vector<uint32_t>{1, 2, 3, 4, 5}));
  EXPECT_TRUE(ParseTokens("", "--tokens", false)->empty());
}

TEST(ParseTokens, NamesKeyAndValue) {
  EXPECT_EQ(MessageOf(ParseTokens("1,x,3", "--tokens", false).status()),
            "--tokens: \"x\" is not a token id: must be a whole number from 0 to 4294967295");
  EXPECT_EQ(MessageOf(ParseTokens("1\n2 4294967296", "prompt.txt", true).status()),
            "prompt.txt:2: \"4294967296\" is not a token id: must be a whole number from 0 to "
            "4294967295");
}

TEST(ParseTokens, BoundsTheCount) {
  std::string text;
  for (size_t i = 0; i <= kTokensMax; ++i) text += "1 ";
  EXPECT_EQ(MessageOf(ParseTokens(text, "f", true).status()),
            "f: more than 1048576 tokens, the most a prompt may have");
}

TEST(Names, GoBothWays) {
  EXPECT_EQ(TierName(v1::TIER_NVME), "NVME");
  EXPECT_EQ(TierName(static_cast<v1::Tier>(77)), "?");
  EXPECT_EQ(DTypeName(v1::DTYPE_F8_E4M3), "F8_E4M3");
  EXPECT_EQ(*ParseTier("gpu"), v1::TIER_GPU);
  EXPECT_EQ(*ParseDType("BF16"), v1::DTYPE_BF16);
  EXPECT_EQ(MessageOf(ParseTier("tape").status()), "\"tape\" must be one of gpu, host, nvme");
  EXPECT_EQ(MessageOf(ParseTier("unspecified").status()),
            "\"unspecified\" must be one of gpu, host, nvme");
}

// Parses a command line as `larder` does; answers the message, or "" when it was accepted.
std::string Parse(CLI::App& app, std::vector<std::string> arguments) {
  std::reverse(arguments.begin(), arguments.end());  // CLI11 takes them from the back
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& error) {
    return error.what();
  }
  return "";
}

class PromptFlagsTest : public testing::Test {
 protected:
  PromptFlagsTest() { flags_.AddTo(app_); }

  CLI::App app_;
  PromptFlags flags_;
};

TEST_F(PromptFlagsTest, TextIsBytes) {
  EXPECT_EQ(Parse(app_, {"--model", "m", "--text", "a\xff"}), "");
  EXPECT_EQ(*flags_.tokens.Read(), (std::vector<uint32_t>{'a', 255}));
}

TEST_F(PromptFlagsTest, FileHasLines) {
  const std::string path = testing::TempDir() + "tokens.txt";
  std::ofstream(path) << "1 2\n3\nfour\n";
  EXPECT_EQ(Parse(app_, {"--model", "m", "--tokens-file", path}), "");
  EXPECT_EQ(MessageOf(flags_.tokens.Read().status()),
            path + ":3: \"four\" is not a token id: must be a whole number from 0 to 4294967295");
}

TEST_F(PromptFlagsTest, MissingFileIsNamed) {
  EXPECT_EQ(Parse(app_, {"--tokens-file", "/nowhere/t"}), "");
  EXPECT_EQ(MessageOf(flags_.tokens.Read().status()),
            "--tokens-file: \"/nowhere/t\": No such file or directory");
}

TEST_F(PromptFlagsTest, ExactlyOnePrompt) {
  EXPECT_NE(Parse(app_, {"--model", "m"}), "");
  EXPECT_NE(Parse(app_, {"--tokens", "1", "--text", "a"}), "");
}

TEST_F(PromptFlagsTest, BadValuesNameKeyValueAndBound) {
  EXPECT_EQ(Parse(app_, {"--tokens", "1", "--layers", "1025"}),
            "--layers: \"1025\" must be a whole number from 1 to 1024");
  EXPECT_EQ(Parse(app_, {"--tokens", "1", "--dtype", "f64"}),
            "--dtype: \"f64\" must be one of f32, f16, bf16, f8_e4m3, i8");
  EXPECT_EQ(Parse(app_, {"--tokens", "1", "--model-id", "zz"}),
            "--model-id: \"zz\" must be 1 to 16 hex digits, not all 0");
}

TEST_F(PromptFlagsTest, ModelOrModelId) {
  EXPECT_NE(Parse(app_, {"--tokens", "1", "--model", "m", "--model-id", "1"}), "");
}

TEST(Commands, RegisterAndParse) {
  CLI::App app;
  Invocation invocation;
  app.require_subcommand(1);
  RegisterStatus(app, invocation);
  RegisterLookup(app, invocation);
  RegisterPut(app, invocation);
  RegisterGet(app, invocation);
  RegisterPrefetch(app, invocation);
  RegisterReplay(app, invocation);
  EXPECT_EQ(Parse(app, {"sessions", "--leases"}), "");
  EXPECT_NE(Parse(app, {"put", "--model", "m", "--text", "a"}), "") << "neither --data nor --fill";
  EXPECT_EQ(Parse(app, {"put", "--model", "m", "--text", "a", "--fill"}), "");
  EXPECT_EQ(Parse(app, {"prefetch", "--model", "m", "--text", "a", "--tier", "nvme"}),
            "--tier: \"nvme\" must be one of gpu, host");
  EXPECT_EQ(Parse(app, {"evict", "--tier", "nvme"}), "");
  EXPECT_EQ(Parse(app, {"replay", "--trace", "t", "--workers", "0"}),
            "--workers: \"0\" must be a whole number from 1 to 64");
  EXPECT_NE(Parse(app, {"replay"}), "");
  EXPECT_NE(Parse(app, {"dance"}), "");
}

// A failed call, a refused value and a daemon that is away are told apart by scripts.
TEST(Commands, ExitCodes) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::AbortedError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::DeadlineExceededError("")), 1);
  EXPECT_EQ(ExitCodeOf(absl::InvalidArgumentError("")), 2);
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("")), 3);
}

TEST(Commands, WithoutADaemon) {
  CLI::App app;
  Invocation invocation;
  invocation.address = "unix:" + testing::TempDir() + "nobody.sock";
  RegisterStatus(app, invocation);
  ASSERT_EQ(Parse(app, {"status"}), "");
  EXPECT_EQ(invocation.run(), kUnreachable);
  invocation.address = "nonsense";
  EXPECT_EQ(invocation.run(), kUsage);
}

}  // namespace
}  // namespace larder::cli
