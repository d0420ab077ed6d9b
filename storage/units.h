// Sizes and durations as people write them.
//
// Thread safety: pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace larder {

// "4096", "64KiB", "512MiB", "8GiB", "2TiB"; whole numbers. nullopt: anything else, or too
// large for 64 bits.
std::optional<uint64_t> ParseBytes(std::string_view text);

// The shortest exact form of the above: 8589934592 is "8 GiB", 4097 is "4097 bytes".
std::string FormatBytes(uint64_t bytes);

// "5%" or "0.05". nullopt: anything else, or outside of [0, 1].
std::optional<double> ParseFraction(std::string_view text);

}  // namespace larder
