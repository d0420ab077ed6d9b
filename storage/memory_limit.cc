#include "storage/memory_limit.h"

#include <algorithm>
#include <fstream>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace larder {
namespace {

std::optional<uint64_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (file >> value) return value;
  return std::nullopt;  // missing, or "max"
}

std::optional<uint64_t> MemAvailable() {
  std::ifstream meminfo("/proc/meminfo");
  std::string name, unit;
  uint64_t kib = 0;
  while (meminfo >> name >> kib) {
    std::getline(meminfo, unit);
    if (name == "MemAvailable:") return kib << 10;
  }
  return std::nullopt;
}

// Page cache that the cgroup gives back before it runs out.
uint64_t InactiveFile(const std::string& folder) {
  std::ifstream stat(folder + "/memory.stat");
  std::string name;
  uint64_t bytes = 0;
  while (stat >> name >> bytes) {
    if (name == "inactive_file") return bytes;
  }
  return 0;
}

// "/a/b" from the line "0::/a/b" of /proc/self/cgroup.
std::optional<std::string> CgroupPath() {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    if (absl::StartsWith(line, "0::/")) return line.substr(3);
  }
  return std::nullopt;
}

}  // namespace

MemoryRoom MemoryAvailable() {
  MemoryRoom room;
  if (auto available = MemAvailable()) room = {*available, "MemAvailable of /proc/meminfo"};
  auto path = CgroupPath();
  if (!path) return room;
  // Up to the root, which has limits too when it is the root of a container.
  while (true) {
    const std::string folder = absl::StrCat("/sys/fs/cgroup", *path == "/" ? "" : *path);
    const auto limit = ReadNumber(folder + "/memory.max");
    const auto used = ReadNumber(folder + "/memory.current");
    if (limit && used) {
      const uint64_t taken = *used - std::min(*used, InactiveFile(folder));
      const uint64_t left = *limit > taken ? *limit - taken : 0;
      if (left < room.bytes) room = {left, folder + "/memory.max"};
    }
    if (*path == "/") return room;
    path->resize(std::max<size_t>(path->rfind('/'), 1));
  }
}

}  // namespace larder
