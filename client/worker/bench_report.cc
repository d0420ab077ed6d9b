#include "client/worker/bench_report.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/json.h"
#include "client/output.h"
#include "storage/check.h"

namespace larder::worker::bench {
namespace {

absl::Status CannotWrite(const std::string& path, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat("\"", path, "\" cannot be written: ", why));
}

absl::Status WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (file) return absl::OkStatus();
  return CannotWrite(path, std::strerror(errno));
}

// RFC 4180.
std::string CsvCell(const std::string& cell) {
  if (cell.find_first_of(",\"\n") == std::string::npos) return cell;
  std::string quoted = "\"";
  for (const char c : cell) quoted.append(c == '"' ? 2 : 1, c);
  return quoted + "\"";
}

std::string CsvLine(const std::vector<std::string>& cells) {
  return absl::StrJoin(cells, ",",
                       [](std::string* out, const std::string& cell) { *out += CsvCell(cell); }) +
         "\n";
}

// Inside gnuplot's double quotes.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + "\"";
}

// A gnuplot program with its data inside, drawing to `path`.
std::string ProgramOf(const Plot& plot, const std::string& path) {
  std::string text = absl::StrCat(
      "set terminal svg size 760,460 font 'Sans,14' background rgb 'white'\n", "set output ",
      Quoted(path), "\nset title ", Quoted(plot.title), " noenhanced\n", "set xlabel ",
      Quoted(plot.x_label), " noenhanced\nset ylabel ", Quoted(plot.y_label), " noenhanced\n",
      "set grid lc rgb '#cccccc' lt 1 lw 0.5\nset key tmargin center horizontal noenhanced\n",
      plot.x_log ? "set logscale x 2\n" : "set xrange [0:*]\n",
      plot.y_log ? "set logscale y\n" : "set yrange [0:*]\n");
  for (size_t i = 0; i < plot.curves.size(); ++i) {
    absl::StrAppend(&text, "$curve", i, " << END\n");
    for (const auto& [x, y] : plot.curves[i].points) absl::StrAppend(&text, x, " ", y, "\n");
    text += "END\n";
  }
  text += "plot ";
  for (size_t i = 0; i < plot.curves.size(); ++i) {
    // Points are drawn where they can be told apart.
    const char* const style =
        plot.curves[i].points.size() <= 40 ? "linespoints pt 7 ps 0.5" : "lines";
    absl::StrAppend(&text, i == 0 ? "" : ", ", "$curve", i, " using 1:2 with ", style,
                    " lw 2 title ", Quoted(plot.curves[i].title));
  }
  return text + "\n";
}

bool HasGnuplot() { return std::system("command -v gnuplot >/dev/null 2>&1") == 0; }

}  // namespace

absl::StatusOr<Report> Report::Create(std::string directory, const std::string& rows_file,
                                      bool json) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return CannotWrite(directory, error.message());
  Report report(std::move(directory), json);
  report.without_gnuplot_ = !HasGnuplot();
  if (report.without_gnuplot_) {
    std::fprintf(stderr,
                 "larder-worker bench: gnuplot is not installed (package gnuplot-nox): "
                 "no plots are drawn\n");
  }
  if (rows_file.empty()) return report;
  report.rows_.open(rows_file, std::ios::app);
  if (!report.rows_) return CannotWrite(rows_file, std::strerror(errno));
  return report;
}

void Report::Print(const Table& table) const {
  if (json_) {
    std::puts(cli::Dump({{"name", table.name},
                         {"heading", table.heading},
                         {"titles", table.titles},
                         {"rows", table.rows}})
                  .c_str());
  } else {
    // Figures are read from the right, the first column from the left.
    std::vector<std::string> titles;
    for (const std::string& title : table.titles) {
      titles.push_back(absl::StrCat(titles.empty() ? "" : ">", title));
    }
    cli::Table text(titles);
    for (const std::vector<std::string>& row : table.rows) text.AddRow(row);
    std::printf("%s\n\n%s\n", table.heading.c_str(), text.Render().c_str());
  }
  std::fflush(stdout);
}

absl::Status Report::Add(const Table& table) {
  Print(table);
  std::string csv = CsvLine(table.titles);
  for (const std::vector<std::string>& row : table.rows) {
    LARDER_CHECK(row.size() == table.titles.size());
    csv += CsvLine(row);
  }
  return WriteFile(absl::StrCat(directory_, "/", table.name, ".csv"), csv);
}

absl::Status Report::Add(const Plot& plot) {
  if (without_gnuplot_) return absl::OkStatus();
  const std::string path = absl::StrCat(directory_, "/", plot.name, ".svg");
  std::FILE* const gnuplot = popen("gnuplot", "w");
  if (gnuplot == nullptr) return absl::InternalError("gnuplot cannot be started");
  const std::string program = ProgramOf(plot, path);
  std::fwrite(program.data(), 1, program.size(), gnuplot);
  const int code = pclose(gnuplot);
  if (code == 0) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("gnuplot: ", path, ": ended with ", code));
}

void Report::Add(const GoalRow& row) {
  if (!rows_.is_open()) return;
  const bool held = row.at_most > 0;
  // As bench.h prints numbers: four significant digits.
  double value = row.value;
  (void)absl::SimpleAtod(absl::StrFormat("%.4g", row.value), &value);
  const cli::Json json = {{"name", row.name},
                          {"value", value},
                          {"unit", row.unit},
                          {"against", row.against},
                          {"ratio", value},
                          {"goal", held ? absl::StrFormat("<= %g", row.at_most) : "report"},
                          {"met", held ? cli::Json(row.value <= row.at_most) : cli::Json()}};
  rows_ << cli::Dump(json) << "\n" << std::flush;
}

void Report::Say(std::string_view sentence) {
  if (json_) return;
  std::printf("%.*s\n\n", static_cast<int>(sentence.size()), sentence.data());
  std::fflush(stdout);
}

std::string Fixed(double value, int digits) { return absl::StrFormat("%.*f", digits, value); }

std::string Milliseconds(absl::Duration duration) {
  const double ms = absl::ToDoubleMilliseconds(duration);
  return Fixed(ms, ms >= 100 ? 0 : ms >= 10 ? 1 : ms >= 1 ? 2 : 3);
}

std::string YesNo(bool yes) { return yes ? "yes" : "NO"; }

absl::Duration Median(std::vector<absl::Duration> samples) {
  LARDER_CHECK(!samples.empty());
  std::sort(samples.begin(), samples.end());
  const size_t middle = samples.size() / 2;
  if (samples.size() % 2 == 1) return samples[middle];
  return (samples[middle - 1] + samples[middle]) / 2;
}

}  // namespace larder::worker::bench
