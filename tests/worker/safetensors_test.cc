#include "client/worker/safetensors.h"

#include <cstring>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/worker/model_files.h"

namespace larder::worker {
namespace {

using testing::HasSubstr;

absl::StatusOr<SafetensorsEntries> Parse(const std::string& file) {
  return ParseSafetensors(std::as_bytes(std::span(file)));
}

TEST(SafetensorsTest, FindsEveryTensor) {
  const std::string file = Safetensors(
      {{"b", "F32", {2, 1}, "12345678"}, {"a", "BF16", {3}, "abcdef"}, {"empty", "F16", {0}, ""}});
  const auto entries = Parse(file);
  ASSERT_TRUE(entries.ok()) << entries.status();
  ASSERT_EQ(entries->size(), 3u);
  const SafetensorsEntry& a = entries->at("a");
  EXPECT_EQ(a.dtype, Dtype::kBf16);
  EXPECT_EQ(a.shape, std::vector<uint64_t>{3});
  EXPECT_EQ(std::memcmp(a.bytes.data(), "abcdef", 6), 0);
  EXPECT_EQ(entries->at("b").bytes.size(), 8u);
  EXPECT_EQ(entries->at("empty").bytes.size(), 0u);
}

struct Refusal {
  const char* header;
  size_t data_bytes;
  const char* message;
};

TEST(SafetensorsTest, RefusesHeadersThatLie) {
  const Refusal refusals[] = {
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,12]}})", 8,
       "a.data_offsets: 0 to 12; allowed: an interval within 0 to 8"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", 8, "a.data_offsets: 8 to 0;"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8,
       "allowed: as many bytes as shape and dtype say, 12"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}})", 0,
       "which is above 2^64"},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,0]}})", 0,
       "a.shape: allowed: whole numbers"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "a.shape"},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}})", 4,
       "a.shape: allowed: a list of at most 8"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4,
       "a.data_offsets: allowed: a list of 2"},
      {R"({"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}})", 8, "a.dtype: \"I64\""},
      {R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4, "a.dtype: missing"},
      {R"({"a":7})", 0, "a: allowed: an object"},
      {R"({"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, "a name of 0 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
       R"("b":{"dtype":"F16","shape":[2],"data_offsets":[2,6]}})",
       6, "b.data_offsets: begins at 2; allowed: where the tensor before it ends, 4"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8,
       "a.data_offsets: begins at 4; allowed: where the tensor before it ends, 0"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5,
       "data: 5 bytes; allowed: as many as the tensors have, 4"},
      {R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},)"
       R"("a":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}})",
       2, "the key \"a\" is there twice"},
      {R"([1])", 0, "header: not a JSON object"},
      {R"({"a":)", 0, "header: not JSON"},
  };
  for (const Refusal& refusal : refusals) {
    // Spaces make the data begin at a multiple of 8, so that nothing else is wrong.
    std::string header = refusal.header;
    header.resize((header.size() + 7) / 8 * 8, ' ');
    const auto entries = Parse(RawSafetensors(header, std::string(refusal.data_bytes, 'x')));
    ASSERT_FALSE(entries.ok()) << refusal.header;
    EXPECT_THAT(std::string(entries.status().message()), HasSubstr(refusal.message));
  }
}

TEST(SafetensorsTest, RefusesTensorsThatAreNotAligned) {
  std::string header = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  header.resize((header.size() + 7) / 8 * 8 + 2, ' ');
  EXPECT_THAT(std::string(Parse(RawSafetensors(header, "1234")).status().message()),
              HasSubstr("allowed: aligned in the file to 4 bytes"));
}

TEST(SafetensorsTest, RefusesEveryTruncation) {
  const std::string file =
      Safetensors({{"a", "F32", {2}, "12345678"}, {"b", "F16", {4}, "abcdefgh"}});
  ASSERT_TRUE(Parse(file).ok());
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_FALSE(Parse(file.substr(0, size)).ok()) << size;
  }
  EXPECT_FALSE(Parse(file + "x").ok());
}

TEST(SafetensorsTest, RefusesHeadersOfAnySizeThatIsNotThere) {
  for (const char* length : {"\x01\0\0\0\0\0\0\0", "\xff\xff\xff\xff\xff\xff\xff\xff",
                             "\0\0\0\0\0\0\0\x80", "\0\0\0\x02\0\0\0\0"}) {
    EXPECT_THAT(std::string(Parse(std::string(length, 8)).status().message()),
                HasSubstr("header: "));
  }
}

}  // namespace
}  // namespace larder::worker
