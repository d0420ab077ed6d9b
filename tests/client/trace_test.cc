#include "client/trace.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <string>

namespace larder {
namespace {

std::string WriteFile(const std::string& name, const std::string& text) {
  const std::string path = testing::TempDir() + name;
  std::ofstream(path) << text;
  return path;
}

std::string ErrorOf(const std::string& line) {
  return std::string(ParseTraceLine(line).status().message());
}

TEST(TraceLine, ReadsEveryField) {
  absl::StatusOr<TraceRequest> request = ParseTraceLine(
      R"({"timestamp": 27, "input_length": 1100, "output_length": 3, )"
      R"("hash_ids": [0, 46, 4294967295]})");
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(*request, (TraceRequest{0, 27, 1100, 3, {0, 46, 4294967295u}}));
}

TEST(TraceLine, OnlyHashIdsAreRequired) {
  absl::StatusOr<TraceRequest> request = ParseTraceLine(R"({"hash_ids": [], "model": "x"})");
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(*request, TraceRequest());
}

TEST(TraceLine, SaysWhatIsWrong) {
  EXPECT_EQ(ErrorOf("{"), "not JSON");
  EXPECT_EQ(ErrorOf("[1]"), "not a JSON object");
  EXPECT_EQ(ErrorOf("{}"), "hash_ids is missing");
  EXPECT_EQ(ErrorOf(R"({"hash_ids": 3})"), "hash_ids is not a list");
  EXPECT_EQ(ErrorOf(R"({"hash_ids": [1, -2]})"),
            "hash_ids[1] is -2, must be a whole number from 0 to 4294967295");
  EXPECT_EQ(ErrorOf(R"({"hash_ids": [4294967296]})"),
            "hash_ids[0] is 4294967296, must be a whole number from 0 to 4294967295");
  EXPECT_EQ(ErrorOf(R"({"hash_ids": ["a"]})"),
            "hash_ids[0] is \"a\", must be a whole number from 0 to 4294967295");
  EXPECT_EQ(ErrorOf(R"({"timestamp": -1, "hash_ids": []})"),
            "timestamp is -1, must be a whole number from 0 to 9223372036854775807");
  EXPECT_EQ(ErrorOf(R"({"input_length": 1.5, "hash_ids": []})"),
            "input_length is 1.5, must be a whole number from 0 to 4294967295");
}

TEST(TraceLine, BoundsTheIds) {
  std::string line = R"({"hash_ids": [0)";
  for (uint32_t i = 1; i <= kTraceBlocksMax; ++i) line += ",1";
  EXPECT_EQ(ErrorOf(line + "]}"), "hash_ids has 65537 ids, must have at most 65536");
}

TEST(ReadTrace, NamesFileAndLine) {
  const std::string path =
      WriteFile("bad.jsonl", "{\"hash_ids\": [1]}\n\n  \r\n{\"hash_ids\": [2]}\ngarbage\n");
  absl::StatusOr<std::vector<TraceRequest>> requests = ReadTrace(path);
  EXPECT_EQ(requests.status(), absl::InvalidArgumentError(path + ":5: not JSON"));
  // The bad line is not reached.
  requests = ReadTrace(path, {0, 2});
  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_EQ(requests->size(), 2u);
}

TEST(ReadTrace, SelectsAndKeepsIndexes) {
  const std::string path =
      WriteFile("good.jsonl", "{\"hash_ids\": [1]}\n\n{\"hash_ids\": [2]}\n{\"hash_ids\": [3]}\n");
  absl::StatusOr<std::vector<TraceRequest>> requests = ReadTrace(path, {1, 1});
  ASSERT_TRUE(requests.ok()) << requests.status();
  ASSERT_EQ(requests->size(), 1u);
  EXPECT_EQ(requests->front().index, 1u);
  EXPECT_EQ(requests->front().block_ids, std::vector<uint32_t>{2});
}

TEST(ReadTrace, ALineHasABound) {
  EXPECT_EQ(ReadTrace("/dev/zero").status(),
            absl::InvalidArgumentError("/dev/zero:1: a line of more than 4194304 bytes"));
  std::string line = "{\"hash_ids\": [1]}";
  line.resize(kTraceLineBytesMax, ' ');
  absl::StatusOr<std::vector<TraceRequest>> requests =
      ReadTrace(WriteFile("long.jsonl", line + "\n{\"hash_ids\": [2]}"));
  ASSERT_TRUE(requests.ok()) << requests.status();
  EXPECT_EQ(requests->size(), 2u);
  const std::string path = WriteFile("longer.jsonl", line + " \n");
  EXPECT_EQ(ReadTrace(path).status(),
            absl::InvalidArgumentError(path + ":1: a line of more than 4194304 bytes"));
}

TEST(ReadTrace, NamesAFileThatIsNotThere) {
  const absl::Status status = ReadTrace("/nowhere/trace.jsonl").status();
  EXPECT_EQ(status, absl::NotFoundError("/nowhere/trace.jsonl: No such file or directory"));
}

TEST(ExpandTokens, EqualIdsGiveEqualTokensAndOthersOtherFirstTokens) {
  constexpr uint32_t kBlockTokens = 16;
  std::set<uint32_t> firsts;
  std::vector<uint32_t> ids;
  for (uint32_t id = 0; id < 10'000; ++id) ids.push_back(id * 7919);
  const std::vector<uint32_t> tokens = ExpandTokens(ids, kBlockTokens);
  ASSERT_EQ(tokens.size(), ids.size() * kBlockTokens);
  EXPECT_EQ(tokens, ExpandTokens(ids, kBlockTokens));
  for (size_t i = 0; i < ids.size(); ++i) firsts.insert(tokens[i * kBlockTokens]);
  EXPECT_EQ(firsts.size(), ids.size());
  const uint32_t again[] = {ids[3]};
  EXPECT_EQ(
      ExpandTokens(again, kBlockTokens),
      std::vector<uint32_t>(tokens.begin() + 3 * kBlockTokens, tokens.begin() + 4 * kBlockTokens));
}

TEST(ExpandTokens, OneTokenABlock) {
  const uint32_t ids[] = {5, 6};
  const std::vector<uint32_t> tokens = ExpandTokens(ids, 1);
  ASSERT_EQ(tokens.size(), 2u);
  EXPECT_NE(tokens[0], tokens[1]);
}

}  // namespace
}  // namespace larder
