#include "storage/units.h"

#include <array>
#include <cmath>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace larder {
namespace {

struct Unit {
  absl::string_view name;
  int shift;
};
constexpr std::array<Unit, 4> kUnits = {{{"TiB", 40}, {"GiB", 30}, {"MiB", 20}, {"KiB", 10}}};

bool IsDigits(absl::string_view text) {
  return !text.empty() && text.find_first_not_of("0123456789") == absl::string_view::npos;
}

}  // namespace

std::optional<uint64_t> ParseBytes(std::string_view given) {
  absl::string_view text(given.data(), given.size());
  int shift = 0;
  for (const Unit& unit : kUnits) {
    if (!absl::EndsWith(text, unit.name)) continue;
    shift = unit.shift;
    text.remove_suffix(unit.name.size());
    break;
  }
  uint64_t number = 0;
  if (!IsDigits(text) || !absl::SimpleAtoi(text, &number)) return std::nullopt;
  if (number > std::numeric_limits<uint64_t>::max() >> shift) return std::nullopt;
  return number << shift;
}

std::string FormatBytes(uint64_t bytes) {
  for (const Unit& unit : kUnits) {
    const uint64_t one = uint64_t{1} << unit.shift;
    if (bytes >= one && bytes % one == 0) return absl::StrCat(bytes / one, " ", unit.name);
  }
  return absl::StrCat(bytes, " bytes");
}

std::optional<double> ParseFraction(std::string_view given) {
  absl::string_view text(given.data(), given.size());
  const bool percent = absl::EndsWith(text, "%");
  if (percent) text.remove_suffix(1);
  double value = 0;
  if (text.empty() || !absl::SimpleAtod(text, &value) || !std::isfinite(value)) return std::nullopt;
  if (percent) value /= 100;
  if (value < 0 || value > 1) return std::nullopt;
  return value;
}

}  // namespace larder
