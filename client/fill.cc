#include "client/fill.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "xxhash.h"

namespace larder {
inline namespace client {
namespace {

// Word i of a block: one multiplication between two xor-shifts, so that consecutive words
// are independent and the loop pipelines.
inline uint64_t Word(uint64_t seed, uint64_t i) {
  uint64_t x = seed + i * 0x9e37'79b9'7f4a'7c15;
  x ^= x >> 32;
  x *= 0xd6e8'feb8'6659'fd93;
  return x ^ (x >> 32);
}

constexpr size_t kWord = sizeof(uint64_t);

}  // namespace

std::vector<uint64_t> BlockSeeds(uint64_t model_id, std::span<const uint32_t> tokens,
                                 uint32_t block_tokens) {
  std::vector<uint64_t> seeds;
  seeds.reserve(tokens.size() / block_tokens);
  uint64_t seed = model_id;
  for (size_t at = 0; at + block_tokens <= tokens.size(); at += block_tokens) {
    seed = XXH3_64bits_withSeed(tokens.data() + at, block_tokens * sizeof(uint32_t), seed);
    seeds.push_back(seed);
  }
  return seeds;
}

uint64_t PartSeed(uint64_t seed, uint32_t rank) {
  return rank == 0 ? seed : XXH3_64bits_withSeed(&rank, sizeof(rank), seed);
}

void FillBlock(uint64_t seed, std::span<std::byte> block) {
  const size_t words = block.size() / kWord;
  std::byte* out = block.data();
  for (size_t i = 0; i < words; ++i) {
    const uint64_t word = Word(seed, i);
    std::memcpy(out + i * kWord, &word, kWord);
  }
  const size_t rest = block.size() % kWord;
  if (rest == 0) return;  // an empty span may be a null pointer, which memcpy must not see
  const uint64_t last = Word(seed, words);
  std::memcpy(out + words * kWord, &last, rest);
}

uint64_t WrongBytes(uint64_t seed, std::span<const std::byte> block) {
  // Good blocks, that is nearly all of them, are checked a chunk at a time with no branch
  // in the inner loop; only a chunk that differs is counted byte by byte.
  constexpr size_t kChunkWords = 64;
  std::array<std::byte, kChunkWords * kWord> expected;
  uint64_t wrong = 0;
  for (size_t at = 0; at < block.size(); at += expected.size()) {
    const size_t bytes = std::min(expected.size(), block.size() - at);
    for (size_t i = 0; i < kChunkWords; ++i) {
      const uint64_t word = Word(seed, at / kWord + i);
      std::memcpy(expected.data() + i * kWord, &word, kWord);
    }
    if (std::memcmp(expected.data(), block.data() + at, bytes) == 0) continue;
    for (size_t i = 0; i < bytes; ++i) wrong += expected[i] != block[at + i];
  }
  return wrong;
}

}  // namespace client
}  // namespace larder
