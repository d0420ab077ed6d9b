#include "client/worker/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/worker/json_reader.h"

namespace larder::worker {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are used as they lie");

constexpr uint64_t kLengthBytes = sizeof(uint64_t);
constexpr size_t kDimensionsMax = 8;
constexpr size_t kNameBytesMax = 512;

std::optional<Dtype> DtypeOf(const std::string& name) {
  if (name == "BF16") return Dtype::kBf16;
  if (name == "F16") return Dtype::kF16;
  if (name == "F32") return Dtype::kF32;
  return std::nullopt;
}

// A list of `count` whole numbers (any, at most kDimensionsMax, without one).
absl::StatusOr<std::vector<uint64_t>> ReadNumbers(const nlohmann::json* list,
                                                  absl::string_view path,
                                                  std::optional<size_t> count) {
  const bool is_list = list != nullptr && list->is_array();
  if (!is_list || (count ? list->size() != *count : list->size() > kDimensionsMax)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": allowed: a list of ",
                                                   count ? "" : "at most ",
                                                   count.value_or(kDimensionsMax), " numbers"));
  }
  std::vector<uint64_t> numbers;
  for (const nlohmann::json& number : *list) {
    if (!number.is_number_unsigned()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": allowed: whole numbers, 0 or more"));
    }
    numbers.push_back(number.get<uint64_t>());
  }
  return numbers;
}

// Elements times bytes an element; nothing when that passes 64 bits.
std::optional<uint64_t> BytesOf(const SafetensorsEntry& entry) {
  uint64_t bytes = DtypeBytes(entry.dtype);
  for (const uint64_t extent : entry.shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) return std::nullopt;
  }
  return bytes;
}

absl::StatusOr<SafetensorsEntry> ReadEntry(const std::string& name, const nlohmann::json& json,
                                           std::span<const std::byte> data) {
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": allowed: an object"));
  }
  JsonReader reader(json, absl::StrCat(name, "."));
  const std::string dtype_name = reader.Text("dtype");
  if (!reader.status().ok()) return reader.status();
  const std::optional<Dtype> dtype = DtypeOf(dtype_name);
  if (!dtype) {
    return absl::UnimplementedError(
        absl::StrCat(name, ".dtype: \"", dtype_name.substr(0, 32), "\"; allowed: BF16, F16, F32"));
  }
  auto shape = ReadNumbers(reader.Find("shape"), absl::StrCat(name, ".shape"), std::nullopt);
  if (!shape.ok()) return shape.status();
  const std::string offsets_path = absl::StrCat(name, ".data_offsets");
  const auto offsets = ReadNumbers(reader.Find("data_offsets"), offsets_path, 2);
  if (!offsets.ok()) return offsets.status();
  const uint64_t begin = (*offsets)[0], end = (*offsets)[1];
  if (begin > end || end > data.size()) {
    return absl::InvalidArgumentError(absl::StrCat(offsets_path, ": ", begin, " to ", end,
                                                   "; allowed: an interval within 0 to ",
                                                   data.size(), ", the file's data"));
  }
  SafetensorsEntry entry{
      .dtype = *dtype, .shape = *std::move(shape), .bytes = data.subspan(begin, end - begin)};
  if (const auto bytes = BytesOf(entry); bytes != end - begin) {
    return absl::InvalidArgumentError(absl::StrCat(
        offsets_path, ": ", begin, " to ", end, "; allowed: as many bytes as shape and dtype say, ",
        bytes ? absl::StrCat(*bytes) : "which is above 2^64"));
  }
  if (reinterpret_cast<uintptr_t>(entry.bytes.data()) % DtypeBytes(*dtype) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(offsets_path, ": ", begin,
                                                   "; allowed: aligned in the file to ",
                                                   DtypeBytes(*dtype), " bytes, one element"));
  }
  return entry;
}

// Invariant 1, second half: in the order of their bytes each begins where the last one ended.
absl::Status CheckCover(const SafetensorsEntries& entries, std::span<const std::byte> data) {
  std::vector<const SafetensorsEntries::value_type*> in_order;
  for (const auto& entry : entries) in_order.push_back(&entry);
  std::sort(in_order.begin(), in_order.end(), [](const auto* a, const auto* b) {
    const auto key = [](const auto* e) {
      return std::pair(e->second.bytes.data(), e->second.bytes.size());
    };
    return key(a) < key(b);
  });
  const std::byte* place = data.data();
  for (const auto* entry : in_order) {
    const std::span<const std::byte> bytes = entry->second.bytes;
    if (bytes.data() != place) {
      return absl::InvalidArgumentError(
          absl::StrCat(entry->first, ".data_offsets: begins at ", bytes.data() - data.data(),
                       "; allowed: where the tensor before it ends, ", place - data.data()));
    }
    place = bytes.data() + bytes.size();
  }
  if (place != data.data() + data.size()) {
    return absl::InvalidArgumentError(absl::StrCat("data: ", data.size(),
                                                   " bytes; allowed: as many as the tensors have, ",
                                                   place - data.data()));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SafetensorsEntries> ParseSafetensors(std::span<const std::byte> file) {
  if (file.size() < kLengthBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("file: ", file.size(), " bytes; allowed: at least ", kLengthBytes));
  }
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), kLengthBytes);
  const uint64_t header_bytes_max =
      std::min<uint64_t>(kSafetensorsHeaderBytesMax, file.size() - kLengthBytes);
  if (header_bytes > header_bytes_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("header: ", header_bytes, " bytes; allowed: at most ", header_bytes_max));
  }
  const std::span<const std::byte> header = file.subspan(kLengthBytes, header_bytes);
  const std::span<const std::byte> data = file.subspan(kLengthBytes + header_bytes);
  const absl::StatusOr<nlohmann::json> json = ParseJson(
      absl::string_view(reinterpret_cast<const char*>(header.data()), header.size()), "header");
  if (!json.ok()) return json.status();

  SafetensorsEntries entries;
  for (const auto& [name, value] : json->items()) {
    if (name == "__metadata__") continue;  // says nothing about the tensors
    if (name.empty() || name.size() > kNameBytesMax) {
      return absl::InvalidArgumentError(
          absl::StrCat("header: a name of ", name.size(), " bytes; allowed: 1 to ", kNameBytesMax));
    }
    absl::StatusOr<SafetensorsEntry> entry = ReadEntry(name, value, data);
    if (!entry.ok()) return entry.status();
    entries.emplace(name, *std::move(entry));
  }
  const absl::Status covered = CheckCover(entries, data);
  if (!covered.ok()) return covered;
  return entries;
}

}  // namespace larder::worker
