#include "client/worker/tokenizer.h"

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace larder::worker {

absl::StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view text) const {
  if (!byte_level()) {
    return absl::FailedPreconditionError(
        absl::StrCat("text: this model has ", vocab_,
                     " tokens; text is taken by byte-level models only (256 or 257), others are "
                     "given token ids"));
  }
  std::vector<uint32_t> tokens;
  tokens.reserve(text.size());
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
  return tokens;
}

std::string Tokenizer::Decode(std::span<const uint32_t> tokens) const {
  if (!byte_level()) return absl::StrJoin(tokens, " ");
  std::string text;
  text.reserve(tokens.size());
  for (const uint32_t token : tokens) {
    if (token < 256) text.push_back(static_cast<char>(token));
  }
  return text;
}

absl::StatusOr<std::vector<uint32_t>> Tokenizer::ParseIds(std::string_view list) const {
  std::vector<uint32_t> tokens;
  for (const absl::string_view word :
       absl::StrSplit(absl::string_view(list.data(), list.size()), absl::ByAnyChar(", \t\r\n"),
                      absl::SkipEmpty())) {
    uint32_t token = 0;
    if (!absl::SimpleAtoi(word, &token) || token >= vocab_) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokens: \"", word.substr(0, 32), "\"; allowed: 0 to ", vocab_ - 1));
    }
    tokens.push_back(token);
  }
  return tokens;
}

}  // namespace larder::worker
