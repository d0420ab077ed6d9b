// TileCheck: measures whether a TileProduct keeps rows apart.
//
// Thread safety: free functions.
#pragma once

#include <cstddef>
#include <vector>

#include "absl/status/statusor.h"
#include "client/worker/tile_product.h"

namespace larder::worker {

// Which of tile_rows(), by index, give every row of a test product the same bits. The smallest
// tile that gives a row the same bits in each of its places, whatever its other rows are, is
// the standard; larger ones must agree with it. Empty: none does. RESOURCE_EXHAUSTED where
// memory does not suffice.
absl::StatusOr<std::vector<size_t>> EqualTiles(const TileProduct& product);

}  // namespace larder::worker
