#include "idle_daemon.h"

#include <unistd.h>

#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "bench.h"
#include "storage/check.h"

namespace larder::bench {
namespace {

constexpr int kWindows = 3;
constexpr absl::Duration kWindow = absl::Seconds(10);
constexpr double kArenasMib = 1024;

std::string ProcFile(pid_t pid, const std::string& name) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/", name));
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// User and system time of the process so far.
double CpuSeconds(pid_t pid) {
  // The fields after the program's name, which may hold anything but ends in the last ')'.
  const std::string stat = ProcFile(pid, "stat");
  std::istringstream fields(stat.substr(stat.rfind(')') + 1));
  std::string skipped;
  for (int field = 3; field < 14; ++field) fields >> skipped;
  double user = 0;
  double system = 0;
  fields >> user >> system;
  LARDER_CHECK(!fields.fail());
  return (user + system) / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

// A field of /proc/PID/status that is in KiB.
double StatusMib(pid_t pid, const std::string& field) {
  std::istringstream lines(ProcFile(pid, "status"));
  std::string line;
  while (std::getline(lines, line)) {
    if (line.compare(0, field.size() + 1, field + ":") == 0) {
      return std::stod(line.substr(field.size() + 1)) / 1024;
    }
  }
  LARDER_CHECK(false, "no such field in /proc/PID/status");
  return 0;
}

}  // namespace

absl::Status MeasureIdle(const DaemonPlace& place) {
  const TemporaryFolder folder(place.folder);
  const absl::StatusOr<std::unique_ptr<Child>> daemon = Child::Start(
      {place.larderd, "--listen=unix:" + folder.path() + "/larder.sock", "--gpu=emulated",
       "--gpu-bytes=512MiB", "--host-bytes=512MiB", "--nvme-dir=" + folder.path() + "/nvme",
       "--nvme-bytes=256MiB", "--log-level=error"});
  if (!daemon.ok()) return daemon.status();
  const pid_t pid = (*daemon)->pid();
  absl::SleepFor(absl::Seconds(2));  // what starting leaves to do in the background
  std::vector<double> percents;
  std::vector<double> overheads;
  for (int window = 0; window < kWindows; ++window) {
    const double before = CpuSeconds(pid);
    const double seconds = Timed([] { absl::SleepFor(kWindow); });
    percents.push_back(100 * (CpuSeconds(pid) - before) / seconds);
    // The arenas are all of its shared memory, and not one page of another kind.
    overheads.push_back(StatusMib(pid, "VmRSS") - kArenasMib);
  }
  const double cpu = Median(percents);
  Print({"idle_cpu_percent", cpu, "%", "one CPU: 100 %", cpu / 100, {Goal::kAtMost, 1, ""}},
        percents);
  const double overhead = Median(overheads);
  Print({"rss_overhead_mib",
         overhead,
         "MiB",
         absl::StrFormat("arenas: %.0f MiB; of the rest anonymous: %.1f, files: %.1f", kArenasMib,
                         StatusMib(pid, "RssAnon"), StatusMib(pid, "RssFile")),
         overhead / kArenasMib,
         {Goal::kAtMost, 64, ""}},
        overheads);
  return absl::OkStatus();
}

}  // namespace larder::bench
