#include "client/output.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/commands.h"

namespace larder::cli {
namespace {

constexpr absl::Duration kRedraw = absl::Milliseconds(100);
constexpr uint64_t kBarCells = 30;

void AppendCell(const std::string& cell, size_t width, bool right, bool last, std::string& line) {
  const std::string padding(width - cell.size(), ' ');
  if (right) absl::StrAppend(&line, padding, cell);
  if (!right) absl::StrAppend(&line, cell, last ? "" : padding);
  if (!last) line += "  ";
}

}  // namespace

Table::Table(std::vector<std::string> titles) : titles_(std::move(titles)) {
  for (std::string& title : titles_) {
    right_.push_back(!title.empty() && title.front() == '>');
    if (right_.back()) title.erase(0, 1);
  }
}

void Table::AddRow(std::vector<std::string> cells) {
  for (std::string& cell : cells) {
    std::replace_if(
        cell.begin(), cell.end(), [](char c) { return absl::ascii_iscntrl(c); }, '?');
  }
  cells.resize(titles_.size());
  rows_.push_back(std::move(cells));
}

std::string Table::Render() const {
  std::vector<size_t> widths;
  for (size_t c = 0; c < titles_.size(); ++c) {
    size_t width = titles_[c].size();
    for (const std::vector<std::string>& row : rows_) width = std::max(width, row[c].size());
    widths.push_back(width);
  }
  std::string text;
  const auto append_line = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (size_t c = 0; c < cells.size(); ++c) {
      AppendCell(cells[c], widths[c], right_[c], c + 1 == cells.size(), line);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    absl::StrAppend(&text, line, "\n");
  };
  append_line(titles_);
  for (const std::vector<std::string>& row : rows_) append_line(row);
  return text;
}

std::string FormatCount(uint64_t count) {
  std::string digits = absl::StrCat(count);
  for (size_t at = digits.size(); at > 3; at -= 3) digits.insert(at - 3, 1, ',');
  return digits;
}

std::string FormatBytes(uint64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < kUnits.size()) {
    value /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string FormatRate(double bytes_per_second) {
  if (bytes_per_second <= 0) return "-";
  if (bytes_per_second < 1e9) return absl::StrFormat("%.1f MB/s", bytes_per_second / 1e6);
  return absl::StrFormat("%.2f GB/s", bytes_per_second / 1e9);
}

std::string FormatPercent(uint64_t part, uint64_t whole) {
  if (whole == 0) return "-";
  return absl::StrFormat("%.1f%%", 100.0 * static_cast<double>(part) / static_cast<double>(whole));
}

std::string FormatMicroseconds(double microseconds) {
  if (microseconds < 1e3) return absl::StrFormat("%.0f us", microseconds);
  if (microseconds < 1e6) return absl::StrFormat("%.2f ms", microseconds / 1e3);
  return absl::StrFormat("%.2f s", microseconds / 1e6);
}

std::string FormatAge(uint64_t seconds) {
  const uint64_t minutes = seconds / 60;
  const uint64_t hours = minutes / 60;
  if (minutes == 0) return absl::StrCat(seconds, "s");
  if (hours == 0) return absl::StrFormat("%dm%02ds", minutes, seconds % 60);
  if (hours < 24) return absl::StrFormat("%dh%02dm", hours, minutes % 60);
  return absl::StrFormat("%dd%02dh", hours / 24, hours % 24);
}

std::string FormatId(uint64_t id) { return absl::StrFormat("%016x", id); }

int FlushOutput(std::string_view program, int exit_code) {
  errno = 0;
  std::cout.flush();
  const bool flushed = std::fflush(stdout) == 0;
  const char* const why = errno == 0 ? "cannot be written" : std::strerror(errno);
  if (flushed && std::ferror(stdout) == 0 && std::cout.good()) return exit_code;
  std::fprintf(stderr, "%.*s: stdout: %s\n", static_cast<int>(program.size()), program.data(), why);
  return exit_code == kOk ? kFailed : exit_code;
}

std::string ProgressLine(std::string_view label, uint64_t done, uint64_t total,
                         std::string_view note) {
  const uint64_t shown = std::min(done, total);
  const uint64_t cells = total == 0 ? kBarCells : shown * kBarCells / total;
  std::string line(label);
  absl::StrAppend(&line, " [", std::string(cells, '#'), std::string(kBarCells - cells, '-'), "] ",
                  FormatCount(done), "/", FormatCount(total));
  if (!note.empty()) absl::StrAppend(&line, " ", std::string(note));
  return line;
}

Progress::Progress(std::string label, uint64_t total)
    : label_(std::move(label)), total_(total), on_terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (on_terminal_ && drawn_ != absl::InfinitePast()) std::fputs("\r\033[K", stderr);
}

void Progress::Update(uint64_t done, std::string_view note) {
  if (!on_terminal_) return;
  const absl::Time now = absl::Now();
  if (now - drawn_ < kRedraw && done < total_) return;
  drawn_ = now;
  std::fputs(absl::StrCat("\r\033[K", ProgressLine(label_, done, total_, note)).c_str(), stderr);
}

}  // namespace larder::cli
