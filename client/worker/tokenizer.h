// Tokenizer: text to tokens and back for byte-level models, in which a byte is a token.
// Models with another vocabulary are given token ids.
//
// Thread safety: a value; const calls from any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace larder::worker {

class Tokenizer {
 public:
  // Of a model with `vocab` tokens. 256: the bytes. 257: the bytes, and 256 ends a text.
  explicit Tokenizer(uint32_t vocab) : vocab_(vocab) {}

  bool byte_level() const { return vocab_ == 256 || vocab_ == 257; }
  // The token after which a text has ended; nothing where there is none.
  std::optional<uint32_t> end_token() const {
    return vocab_ == 257 ? std::optional<uint32_t>(256) : std::nullopt;
  }

  // FAILED_PRECONDITION unless byte_level().
  absl::StatusOr<std::vector<uint32_t>> Encode(std::string_view text) const;
  // Bytes of a byte-level model, which need not be UTF-8 where a character is cut; its end
  // token is left out. Otherwise the ids, apart by spaces.
  std::string Decode(std::span<const uint32_t> tokens) const;

  // Ids apart by commas or white space, each below the vocabulary. INVALID_ARGUMENT naming the
  // word that is not one.
  absl::StatusOr<std::vector<uint32_t>> ParseIds(std::string_view list) const;

 private:
  uint32_t vocab_;
};

}  // namespace larder::worker
