// Output: tables, numbers and progress bars for people.
//
// Thread safety: values; Progress is for one thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"

namespace larder::cli {

// Columns as wide as their widest cell, two spaces apart. A title that starts with '>' is
// aligned to the right, and so are its cells.
class Table {
 public:
  explicit Table(std::vector<std::string> titles);

  // Missing cells are empty; there must not be more cells than titles. Control characters, as
  // another may have put into a worker's name, become '?': they are orders to a terminal.
  void AddRow(std::vector<std::string> cells);
  bool empty() const { return rows_.empty(); }

  std::string Render() const;  // every line ends in a newline

 private:
  std::vector<std::string> titles_;
  std::vector<bool> right_;
  std::vector<std::vector<std::string>> rows_;
};

std::string FormatCount(uint64_t count);                   // 1,234,567
std::string FormatBytes(uint64_t bytes);                   // 512 B, 1.5 MiB
std::string FormatRate(double bytes_per_second);           // 1.52 GB/s; "-" for 0
std::string FormatPercent(uint64_t part, uint64_t whole);  // 12.3%; "-" of nothing
std::string FormatMicroseconds(double microseconds);       // 870 us, 1.25 ms, 3.10 s
std::string FormatAge(uint64_t seconds);                   // 42s, 3m12s, 5h07m, 2d03h
std::string FormatId(uint64_t id);                         // 16 hex digits

// For the end of main: what is still in the buffer of stdout is written. Answers `exit_code`, or
// kFailed and a line on stderr when not everything printed has got there.
int FlushOutput(std::string_view program, int exit_code);

// One line on stderr that is drawn over again, at most ten times a second; nothing at all
// when stderr is not a terminal.
class Progress {
 public:
  Progress(std::string label, uint64_t total);
  ~Progress();  // wipes the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Update(uint64_t done, std::string_view note = {});

 private:
  const std::string label_;
  const uint64_t total_;
  const bool on_terminal_;
  absl::Time drawn_ = absl::InfinitePast();
};

// What Progress draws: "label [#####-----] 5/10 note".
std::string ProgressLine(std::string_view label, uint64_t done, uint64_t total,
                         std::string_view note);

}  // namespace larder::cli
