// What every benchmark needs: a clock, medians, and rows.
//
// A program measures figures and prints each as one line of JSON with the keys of the table:
// name, value, unit, against, ratio, goal, met. run.sh collects the lines. A program runs the
// figures that its arguments name, or all it has. It exits with 1 only when something could
// not be measured, and says why on stderr; a goal that is missed is a row like any other.
//
// Thread safety: none; a benchmark's main thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace larder::bench {

// Seconds of a monotonic clock.
double Now();
// Seconds that `f` takes.
double Timed(const std::function<void()>& f);

// Sorts a copy. CHECK: not empty.
double Median(std::vector<double> samples);

// "12.3 (11.9 to 14.0)": the median and how far the runs lay apart. For stderr.
std::string Spread(const std::vector<double>& runs);
// "0.92 to 1.05": the same for a row's `against`.
std::string Range(const std::vector<double>& ratios);

// What a figure is held to.
struct Goal {
  enum Kind { kReport, kAtMost, kAtLeast };
  Kind kind = kReport;
  double bound = 0;
  std::string note;  // such as a published figure; shown in brackets after the bound

  std::string Text() const;
  bool Met(double value) const;
};

struct Row {
  std::string name;
  double value = 0;
  std::string unit;
  std::string against;  // the peer or limit, and what it took in this run
  double ratio = 0;     // value over the peer's, or what the name says
  Goal goal;
};

// One line of JSON to stdout; the runs' spread to stderr.
void Print(const Row& row, const std::vector<double>& runs);

// A group of figures that are measured together.
struct Benchmark {
  std::vector<std::string> names;
  std::function<absl::Status()> run;
};

// Runs the benchmarks that have one of `wanted` (all when that is empty) and returns main's
// exit code. A name that no benchmark has is left to other programs.
int RunBenchmarks(const std::vector<std::string>& wanted, const std::vector<Benchmark>& all);

// The value of --NAME=VALUE among the arguments, which is taken out of them; else `standard`.
std::string TakeFlag(std::vector<std::string>& arguments, const std::string& name,
                     std::string standard);

}  // namespace larder::bench
