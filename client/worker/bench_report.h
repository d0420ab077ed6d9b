// Report: where an experiment's figures go: a table on stdout, the same as CSV, and curves as
// SVG.
//
// Thread safety: one thread at a time.
//
// Invariants:
//   1. A figure is written once: table and CSV have the same titles and the same cells.
//   2. No file is half written by a run that went well; a plot that gnuplot is not there to draw
//      is said to be missing, once, and is no error.
#pragma once

#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace larder::worker::bench {

// A title says its unit: "TTFT ms".
struct Table {
  std::string name;     // of the CSV file, without its end
  std::string heading;  // what is measured, on what
  std::vector<std::string> titles;
  std::vector<std::vector<std::string>> rows = {};
};

struct Curve {
  std::string title;
  std::vector<std::pair<double, double>> points = {};  // ascending x
};

struct Plot {
  std::string name;  // of the SVG file, without its end
  std::string title;
  std::string x_label;  // with its unit
  std::string y_label;
  bool x_log = false;
  bool y_log = false;
  std::vector<Curve> curves = {};
};

// A row of the project's benchmark table; the keys are those of tests/bench/bench.h.
struct GoalRow {
  std::string name;
  double value = 0;
  std::string unit;
  std::string against;  // the peer, and what it took in this run
  double at_most = 0;   // 0: reported, held to nothing
};

class Report {
 public:
  // `directory` is made where it is not there. `rows_file`: where GoalRows are added, a line of
  // JSON each; empty: nowhere. `json`: tables on stdout are such lines as well. INVALID_ARGUMENT
  // for a directory or file that cannot be written.
  static absl::StatusOr<Report> Create(std::string directory, const std::string& rows_file,
                                       bool json);

  absl::Status Add(const Table& table);
  absl::Status Add(const Plot& plot);
  void Add(const GoalRow& row);
  // What a table does not say, in a sentence.
  void Say(std::string_view sentence);

 private:
  Report(std::string directory, bool json) : directory_(std::move(directory)), json_(json) {}
  void Print(const Table& table) const;

  std::string directory_;
  bool json_;
  std::ofstream rows_;
  bool without_gnuplot_ = false;
};

// Cells.
std::string Fixed(double value, int digits);        // 12.35
std::string Milliseconds(absl::Duration duration);  // three significant digits
std::string YesNo(bool yes);

// Of an odd or even number of samples, at least one.
absl::Duration Median(std::vector<absl::Duration> samples);

}  // namespace larder::worker::bench
