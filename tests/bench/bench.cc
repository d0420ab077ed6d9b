#include "bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "storage/check.h"

namespace larder::bench {
namespace {

std::string Quoted(const std::string& text) {
  return "\"" + absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"\"", "\\\""}}) + "\"";
}

}  // namespace

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double Timed(const std::function<void()>& f) {
  const double start = Now();
  f();
  return Now() - start;
}

double Median(std::vector<double> samples) {
  LARDER_CHECK(!samples.empty());
  const size_t middle = samples.size() / 2;
  std::nth_element(samples.begin(), samples.begin() + middle, samples.end());
  if (samples.size() % 2 == 1) return samples[middle];
  const double below = *std::max_element(samples.begin(), samples.begin() + middle);
  return (below + samples[middle]) / 2;
}

std::string Spread(const std::vector<double>& runs) {
  const auto [least, most] = std::minmax_element(runs.begin(), runs.end());
  return absl::StrFormat("%.4g (%.4g to %.4g in %d runs)", Median(runs), *least, *most,
                         runs.size());
}

std::string Range(const std::vector<double>& ratios) {
  const auto [least, most] = std::minmax_element(ratios.begin(), ratios.end());
  return absl::StrFormat("%.2f to %.2f", *least, *most);
}

std::string Goal::Text() const {
  std::string text = "report";
  if (kind == kAtMost) text = absl::StrFormat("<= %g", bound);
  if (kind == kAtLeast) text = absl::StrFormat(">= %g", bound);
  return note.empty() ? text : text + " (" + note + ")";
}

bool Goal::Met(double value) const { return kind == kAtMost ? value <= bound : value >= bound; }

void Print(const Row& row, const std::vector<double>& runs) {
  const std::string met =
      row.goal.kind == Goal::kReport ? "null" : (row.goal.Met(row.value) ? "true" : "false");
  std::printf(
      "{\"name\": %s, \"value\": %.4g, \"unit\": %s, \"against\": %s, \"ratio\": %.4g, "
      "\"goal\": %s, \"met\": %s}\n",
      Quoted(row.name).c_str(), row.value, Quoted(row.unit).c_str(), Quoted(row.against).c_str(),
      row.ratio, Quoted(row.goal.Text()).c_str(), met.c_str());
  std::fflush(stdout);
  std::fprintf(stderr, "%s: %s\n", row.name.c_str(), Spread(runs).c_str());
}

int RunBenchmarks(const std::vector<std::string>& wanted, const std::vector<Benchmark>& all) {
  int exit_code = 0;
  for (const Benchmark& benchmark : all) {
    const bool asked =
        wanted.empty() || std::any_of(wanted.begin(), wanted.end(), [&](const std::string& name) {
          return std::find(benchmark.names.begin(), benchmark.names.end(), name) !=
                 benchmark.names.end();
        });
    if (!asked) continue;
    if (absl::Status status = benchmark.run(); !status.ok()) {
      std::fprintf(stderr, "%s: not measured: %s\n", benchmark.names.front().c_str(),
                   std::string(status.message()).c_str());
      exit_code = 1;
    }
  }
  return exit_code;
}

std::string TakeFlag(std::vector<std::string>& arguments, const std::string& name,
                     std::string standard) {
  const std::string start = "--" + name + "=";
  const auto found = std::find_if(arguments.begin(), arguments.end(), [&](const std::string& a) {
    return a.compare(0, start.size(), start) == 0;
  });
  if (found == arguments.end()) return standard;
  std::string value = found->substr(start.size());
  arguments.erase(found);
  return value;
}

}  // namespace larder::bench
