// CopyBlock: memcpy for whole blocks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace larder {

// Copies between ranges that do not overlap. Large ones past the caches with non-temporal
// stores: nobody reads a block soon on the CPU that moves it, and the destination needs not be
// read first (storage/README.md has the figures).
void CopyBlock(std::byte* to, const std::byte* from, uint64_t bytes);

}  // namespace larder
