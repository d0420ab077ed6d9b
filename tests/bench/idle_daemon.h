// What a larderd costs that nobody uses.
#pragma once

#include "absl/status/status.h"
#include "daemon_fixture.h"

namespace larder::bench {

// idle_cpu_percent and rss_overhead_mib: all three tiers, 1 GiB of arenas, no worker.
absl::Status MeasureIdle(const DaemonPlace& place);

}  // namespace larder::bench
