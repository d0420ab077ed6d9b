// The figures of the drive, in four files: over raw io_uring, over peers, after a restart, and
// the index.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace larder::bench {

struct DaemonPlace;  // daemon_fixture.h

struct DriveOptions {
  uint64_t block_bytes = 0;
  uint32_t blocks = 0;  // in the file; a run takes some of them
  int pairs = 0;
  std::string suffix;  // of the rows' names
};

// Each makes a temporary folder in `parent`, or in place.folder.
absl::Status MeasureDrive(const std::string& parent, const DriveOptions& options);
absl::Status MeasurePeers(const DaemonPlace& place, const DriveOptions& options);
absl::Status MeasureRestart(const DaemonPlace& place);
absl::Status MeasureIndex(const std::string& parent);

}  // namespace larder::bench
