// Fill: K/V bytes for tests and replays, derived from what a block is identified by, so that
// any process can check any block without having seen it written.
//
// Thread safety: free functions.
//
// Invariants:
//   1. A block's bytes depend on the model, on its tokens and on all tokens before it, and
//      on nothing else: a block served for another prefix or at another position differs
//      in nearly every byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace larder {
inline namespace client {

// One seed for each whole block of `tokens`: seed i chains seed i - 1 with the block's
// tokens. `block_tokens` is at least 1.
std::vector<uint64_t> BlockSeeds(uint64_t model_id, std::span<const uint32_t> tokens,
                                 uint32_t block_tokens);

// The seed of rank `rank`'s part of a block of several shards; rank 0's is the block's own.
uint64_t PartSeed(uint64_t seed, uint32_t rank);

// Writes the block, or the part, of this seed. About 5 GB/s a core on a small virtual machine.
void FillBlock(uint64_t seed, std::span<std::byte> block);

// How many bytes of `block` are not what FillBlock writes; 0 for a good block.
uint64_t WrongBytes(uint64_t seed, std::span<const std::byte> block);

}  // namespace client
}  // namespace larder
