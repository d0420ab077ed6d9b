// Checkpoint: all tensors of a Hugging Face model directory, in one file or in several.
//
//   model.safetensors                                     either this
//   model.safetensors.index.json                          or this, {"weight_map": {tensor: file}},
//   model-00001-of-00002.safetensors, ...                 and the files that it names
//
// Format of the index: huggingface.co/docs/transformers/big_models, "Sharded checkpoints". Nobody
// vouches for any of these files.
//
// Thread safety: values.
//
// Invariants:
//   1. Every tensor that the index names is in the file that it names, and these files hold no
//      other; no name leads out of the directory.
#pragma once

#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/worker/mapped_file.h"
#include "client/worker/safetensors.h"

namespace larder::worker {

struct Checkpoint {
  std::vector<MappedFile> files;
  SafetensorsEntries tensors;  // borrowed from `files`
};

// Maps the files; they must not be changed while the checkpoint lives. Where both forms are there
// the one file counts. NOT_FOUND for a file that is missing, INVALID_ARGUMENT for one that is
// damaged or does not fit its index, naming the file, the tensor, the value and the bound.
absl::StatusOr<Checkpoint> OpenCheckpoint(const std::string& directory);

// Tensor to file, from the text of an index. Files have names like "x.safetensors", without a
// folder. INVALID_ARGUMENT naming the field, the value and the bound.
absl::StatusOr<absl::btree_map<std::string, std::string>> ParseSafetensorsIndex(
    absl::string_view text);

}  // namespace larder::worker
