#include "storage/nvme_written.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <limits>

namespace larder {
namespace {

constexpr size_t kBytesAt = sizeof(uint64_t);
constexpr size_t kHashAt = NvmeWritten::kEncodedBytes - sizeof(uint64_t);

uint64_t SaturatedSum(uint64_t a, uint64_t b) {
  return a > std::numeric_limits<uint64_t>::max() - b ? std::numeric_limits<uint64_t>::max()
                                                      : a + b;
}

}  // namespace

void NvmeWritten::Advance(absl::Time now) {
  const int64_t hour = absl::ToUnixSeconds(now) / 3600;
  const auto passed = static_cast<size_t>(std::clamp<int64_t>(hour - hour_, 0, kHours));
  std::shift_right(bytes_.begin(), bytes_.end(), static_cast<std::ptrdiff_t>(passed));
  std::fill_n(bytes_.begin(), passed, 0);
  hour_ = hour;
}

void NvmeWritten::Add(uint64_t bytes, size_t hours_ago) {
  bytes_[hours_ago] = SaturatedSum(bytes_[hours_ago], bytes);
}

uint64_t NvmeWritten::total_bytes() const {
  uint64_t total = 0;
  for (const uint64_t bytes : bytes_) total = SaturatedSum(total, bytes);
  return total;
}

std::array<char, NvmeWritten::kEncodedBytes> NvmeWritten::Encode() const {
  std::array<char, kEncodedBytes> text;
  std::memcpy(text.data(), &hour_, sizeof(hour_));
  std::memcpy(text.data() + kBytesAt, bytes_.data(), sizeof(bytes_));
  const uint64_t hash = XXH3_64bits(text.data(), kHashAt);
  std::memcpy(text.data() + kHashAt, &hash, sizeof(hash));
  return text;
}

std::optional<NvmeWritten> NvmeWritten::Decode(absl::string_view text) {
  if (text.size() != kEncodedBytes) return std::nullopt;
  uint64_t hash;
  std::memcpy(&hash, text.data() + kHashAt, sizeof(hash));
  if (hash != XXH3_64bits(text.data(), kHashAt)) return std::nullopt;
  NvmeWritten written;
  std::memcpy(&written.hour_, text.data(), sizeof(written.hour_));
  std::memcpy(written.bytes_.data(), text.data() + kBytesAt, sizeof(written.bytes_));
  return written;
}

}  // namespace larder
