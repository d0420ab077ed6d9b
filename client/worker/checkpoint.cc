#include "client/worker/checkpoint.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/container/btree_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/worker/json_reader.h"

namespace larder::worker {
namespace {

constexpr char kOneFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr char kSuffix[] = ".safetensors";
constexpr size_t kFileNameBytesMax = 255;  // what a file system takes
constexpr size_t kFilesMax = 4096;         // each costs a mapping; Linux allows 65,530 a process

bool IsFileName(absl::string_view name) {
  return name.size() > sizeof(kSuffix) - 1 && name.size() <= kFileNameBytesMax &&
         absl::EndsWith(name, kSuffix) &&
         std::none_of(name.begin(), name.end(), [](char c) { return c == '/' || c == '\0'; });
}

absl::Status Annotate(const absl::Status& status, absl::string_view path) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

// Maps one more file; its tensors.
absl::StatusOr<SafetensorsEntries> AddFile(const std::string& path, Checkpoint& checkpoint) {
  absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  absl::StatusOr<SafetensorsEntries> entries = ParseSafetensors(file->bytes());
  if (!entries.ok()) return Annotate(entries.status(), path);
  checkpoint.files.push_back(*std::move(file));
  return entries;
}

absl::StatusOr<Checkpoint> OpenOneFile(const std::string& path) {
  Checkpoint checkpoint;
  absl::StatusOr<SafetensorsEntries> entries = AddFile(path, checkpoint);
  if (!entries.ok()) return entries.status();
  checkpoint.tensors = *std::move(entries);
  return checkpoint;
}

absl::StatusOr<Checkpoint> OpenIndexed(const std::string& directory) {
  const std::string index_path = absl::StrCat(directory, "/", kIndexFile);
  const absl::StatusOr<MappedFile> index = MappedFile::Open(index_path);
  if (!index.ok()) return index.status();
  if (index->bytes().size() > kSafetensorsHeaderBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, ": ", index->bytes().size(),
                                                   " bytes; allowed: at most ",
                                                   kSafetensorsHeaderBytesMax));
  }
  const auto places = ParseSafetensorsIndex(absl::string_view(
      reinterpret_cast<const char*>(index->bytes().data()), index->bytes().size()));
  if (!places.ok()) return Annotate(places.status(), index_path);

  absl::btree_set<std::string> names;
  for (const auto& [tensor, name] : *places) names.insert(name);
  if (names.size() > kFilesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat(index_path, ": ", names.size(), " files; allowed: at most ", kFilesMax));
  }
  Checkpoint checkpoint;
  for (const std::string& name : names) {
    const std::string path = absl::StrCat(directory, "/", name);
    absl::StatusOr<SafetensorsEntries> entries = AddFile(path, checkpoint);
    if (!entries.ok()) return entries.status();
    for (auto& [tensor, entry] : *entries) {
      const auto place = places->find(tensor);
      if (place == places->end() || place->second != name) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": ", tensor, ": ", kIndexFile,
                         place == places->end() ? " names no such tensor"
                                                : absl::StrCat(" has it in ", place->second)));
      }
      checkpoint.tensors.emplace(tensor, std::move(entry));
    }
  }
  for (const auto& [tensor, name] : *places) {
    if (checkpoint.tensors.contains(tensor)) continue;
    return absl::InvalidArgumentError(absl::StrCat(directory, "/", name, ": ", tensor,
                                                   ": missing; ", kIndexFile, " has it there"));
  }
  return checkpoint;
}

}  // namespace

absl::StatusOr<absl::btree_map<std::string, std::string>> ParseSafetensorsIndex(
    absl::string_view text) {
  const absl::StatusOr<nlohmann::json> json = ParseJson(text, "index");
  if (!json.ok()) return json.status();
  const nlohmann::json* const map = JsonReader(*json).Find("weight_map");
  if (map == nullptr || !map->is_object() || map->empty()) {
    return absl::InvalidArgumentError("weight_map: allowed: an object, tensor to file");
  }
  absl::btree_map<std::string, std::string> places;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string() || !IsFileName(file.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(absl::StrCat(
          "weight_map.", tensor, ": ",
          file.is_string() ? absl::StrCat("\"", file.get<std::string>().substr(0, 64), "\"; ") : "",
          "allowed: a file of this directory that ends in ", kSuffix));
    }
    places.emplace(tensor, file.get<std::string>());
  }
  return places;
}

absl::StatusOr<Checkpoint> OpenCheckpoint(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/", kOneFile);
  absl::StatusOr<Checkpoint> one = OpenOneFile(path);
  if (one.ok() || !absl::IsNotFound(one.status())) return one;
  absl::StatusOr<Checkpoint> indexed = OpenIndexed(directory);
  // Who has neither is told of the file that most models have.
  const bool neither = absl::IsNotFound(indexed.status()) &&
                       absl::StrContains(indexed.status().message(), kIndexFile);
  if (neither) return one;
  return indexed;
}

}  // namespace larder::worker
