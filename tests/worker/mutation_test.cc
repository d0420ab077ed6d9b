// Valid model files, damaged at random: each is read or refused, and what is read is what
// safetensors.h promises. The seed of a failure is printed.

#include <algorithm>
#include <random>

#include "client/worker/checkpoint.h"
#include "client/worker/model_config.h"
#include "client/worker/safetensors.h"
#include "gtest/gtest.h"
#include "tests/worker/model_files.h"

namespace larder::worker {
namespace {

constexpr uint32_t kMutations = 30'000;  // of each kind of file

// Pieces that readers of JSON and of sizes have been known to fall over.
constexpr const char* kPieces[] = {"{",
                                   "}",
                                   "[",
                                   "]",
                                   "\"",
                                   ",",
                                   ":",
                                   "\\",
                                   "null",
                                   "true",
                                   "-1",
                                   "0",
                                   "1e999",
                                   "18446744073709551615",
                                   "18446744073709551616",
                                   "9223372036854775808",
                                   "0.5",
                                   "\"F64\"",
                                   "\"BF16\"",
                                   "[[[[[[[[",
                                   "{\"a\":{",
                                   "\xff",
                                   "\xc3",
                                   "\\u0000",
                                   "data_offsets",
                                   "shape"};

void MutateOnce(std::string& text, std::mt19937& random) {
  const size_t at = random() % (text.size() + 1);
  const size_t count = std::min<size_t>(1 + random() % 16, text.size() - at);
  const std::string piece = kPieces[random() % std::size(kPieces)];
  switch (random() % 7) {
    case 0:
      if (at < text.size()) text[at] = static_cast<char>(random());
      break;
    case 1:
      if (at < text.size()) text[at] = static_cast<char>(text[at] ^ 1 << random() % 8);
      break;
    case 2:
      text.erase(at, count);
      break;
    case 3:
      text.insert(at, piece);
      break;
    case 4:
      text.replace(at, count, piece);
      break;
    case 5:
      text.insert(random() % (text.size() + 1), text.substr(at, count));
      break;
    case 6:
      text.resize(at);
      break;
  }
}

std::string Mutated(std::string text, std::mt19937& random) {
  for (uint32_t times = 1 + random() % 3; times > 0; --times) MutateOnce(text, random);
  return text;
}

TEST(MutationTest, SafetensorsAreReadOrRefused) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
      R"("b.weight":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]},)"
      R"("c":{"dtype":"F16","shape":[0,7],"data_offsets":[24,24]}})";
  const std::string data(24, 'd');
  size_t read = 0;
  for (uint32_t seed = 0; seed < kMutations; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    // Half of them with a length that fits, or few would come past it.
    const std::string file = random() % 2 == 0 ? RawSafetensors(Mutated(header, random), data)
                                               : Mutated(RawSafetensors(header, data), random);
    // Memory of exactly this size, so that a sanitizer sees every step beyond it.
    const std::vector<std::byte> bytes(
        reinterpret_cast<const std::byte*>(file.data()),
        reinterpret_cast<const std::byte*>(file.data()) + file.size());
    const auto entries = ParseSafetensors(bytes);
    if (!entries.ok()) {
      ASSERT_FALSE(entries.status().message().empty());
      continue;
    }
    ++read;
    size_t total = 0;
    for (const auto& [name, entry] : *entries) {
      uint64_t expected = DtypeBytes(entry.dtype);
      for (const uint64_t extent : entry.shape) expected *= extent;
      ASSERT_EQ(entry.bytes.size(), expected) << name;
      if (expected == 0) continue;
      ASSERT_GE(entry.bytes.data(), bytes.data());
      ASSERT_LE(entry.bytes.data() + entry.bytes.size(), bytes.data() + bytes.size());
      ASSERT_EQ(reinterpret_cast<uintptr_t>(entry.bytes.data()) % DtypeBytes(entry.dtype), 0u);
      total += entry.bytes.size();
    }
    ASSERT_LE(total, bytes.size());
  }
  // Some damage is harmless (a name, a space); were none read, none would have been tried.
  EXPECT_GT(read, kMutations / 200);
  EXPECT_LT(read, kMutations / 2);
}

TEST(MutationTest, ConfigurationsAreReadOrRefused) {
  const std::string valid = SmallConfigJson();
  size_t read = 0;
  for (uint32_t seed = 0; seed < kMutations; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const auto config = ParseModelConfig(Mutated(valid, random));
    if (!config.ok()) {
      ASSERT_FALSE(config.status().message().empty());
      continue;
    }
    ++read;
    ASSERT_TRUE(Validate(*config).ok()) << Validate(*config);
  }
  EXPECT_GT(read, kMutations / 200);
  EXPECT_LT(read, kMutations / 2);
}

TEST(MutationTest, IndexesAreReadOrRefused) {
  const std::string valid =
      R"({"metadata":{"total_size":24},"weight_map":{"a":"model-00001-of-00002.safetensors",)"
      R"("b.weight":"model-00002-of-00002.safetensors","c":"model-00001-of-00002.safetensors"}})";
  size_t read = 0;
  for (uint32_t seed = 0; seed < kMutations; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    const auto places = ParseSafetensorsIndex(Mutated(valid, random));
    if (!places.ok()) {
      ASSERT_FALSE(places.status().message().empty());
      continue;
    }
    ++read;
    for (const auto& [tensor, file] : *places) {
      ASSERT_EQ(file.find('/'), std::string::npos);
      ASSERT_TRUE(file.ends_with(".safetensors")) << file;
    }
  }
  EXPECT_GT(read, kMutations / 200);
  EXPECT_LT(read, kMutations / 2);
}

}  // namespace
}  // namespace larder::worker
