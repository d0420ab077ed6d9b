// How much memory this process may still take: the machine's and its cgroups' view.
//
// Thread safety: pure functions over /proc and /sys.
#pragma once

#include <cstdint>
#include <string>

namespace larder {

struct MemoryRoom {
  uint64_t bytes = UINT64_MAX;  // UINT64_MAX: not known
  std::string bound_by;         // the name of what bounds it, for messages
};

// The smallest of MemAvailable and, on every level of this process's cgroup v2 path, its limit
// minus its use (inactive page cache does not count as use).
MemoryRoom MemoryAvailable();

}  // namespace larder
