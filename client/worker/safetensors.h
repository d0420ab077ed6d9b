// Safetensors: the tensors of a .safetensors file, which nobody vouches for.
//
//   | N: u64 LE | N bytes of JSON: name -> dtype, shape, [begin, end) | data |
//
// Thread safety: immutable.
//
// Invariants:
//   1. The bytes of every tensor lie inside the data, aligned to its element, and are as many
//      as its shape and dtype say. Together they are the whole data: none overlap, nothing is
//      between or after them.
//   2. Reading the header takes memory in proportion to the header alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/status/statusor.h"
#include "client/worker/kv_geometry.h"

namespace larder::worker {

// More than a model of kLayersMax layers needs, by a lot.
inline constexpr uint64_t kSafetensorsHeaderBytesMax = 16 << 20;

struct SafetensorsEntry {
  Dtype dtype = Dtype::kF32;
  std::vector<uint64_t> shape;
  std::span<const std::byte> bytes;  // borrowed from the file
};

using SafetensorsEntries = absl::btree_map<std::string, SafetensorsEntry>;

// `file`: all of it, at an address aligned to 8 bytes; it must outlive the entries.
// INVALID_ARGUMENT naming the tensor, the value and the bound; UNIMPLEMENTED for a dtype that
// is not BF16, F16 or F32.
absl::StatusOr<SafetensorsEntries> ParseSafetensors(std::span<const std::byte> file);

}  // namespace larder::worker
