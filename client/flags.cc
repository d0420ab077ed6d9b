#include "client/flags.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "client/names.h"
#include "storage/units.h"

namespace larder::cli {
namespace {

absl::string_view Abseil(std::string_view s) { return {s.data(), s.size()}; }

// An option whose text `parse` turns into its value, with our own message when it cannot.
template <typename Value>
CLI::Option* AddParsed(CLI::App& app, const std::string& name, Value& value,
                       std::function<absl::StatusOr<Value>(const std::string&)> parse,
                       const std::string& type, const std::string& help) {
  return app
      .add_option_function<std::string>(
          name,
          [&value, name, parse = std::move(parse)](const std::string& text) {
            absl::StatusOr<Value> parsed = parse(text);
            if (!parsed.ok()) {
              throw CLI::ValidationError(name, std::string(parsed.status().message()));
            }
            value = *parsed;
          },
          help)
      ->type_name(type);
}

absl::Status BadToken(std::string_view source, std::string_view item) {
  return absl::InvalidArgumentError(
      absl::StrCat(Abseil(source), ": \"", Abseil(item.substr(0, 64)),
                   "\" is not a token id: must be a whole number from 0 to ",
                   std::numeric_limits<uint32_t>::max()));
}

absl::Status CheckTokenCount(std::string_view source, size_t count) {
  if (count <= kTokensMax) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(Abseil(source), ": more than ", kTokensMax,
                                                 " tokens, the most a prompt may have"));
}

}  // namespace

absl::StatusOr<uint64_t> ParseNumber(std::string_view text, uint64_t min, uint64_t max) {
  uint64_t value = 0;
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == text.npos;
  if (!digits || !absl::SimpleAtoi(Abseil(text), &value) || value < min || value > max) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", Abseil(text), "\" must be a whole number from ", min, " to ", max));
  }
  return value;
}

absl::StatusOr<double> ParseReal(std::string_view text, double min, double max) {
  double value = 0;
  // NaN is not at least anything.
  if (!absl::SimpleAtod(Abseil(text), &value) || !(value >= min) || value > max) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", Abseil(text), "\" must be a number from ", min, " to ", max));
  }
  return value;
}

absl::StatusOr<absl::Duration> ParseDuration(std::string_view text) {
  absl::Duration duration;
  double seconds = 0;
  bool parsed = absl::ParseDuration(Abseil(text), &duration);
  if (!parsed && absl::SimpleAtod(Abseil(text), &seconds)) {
    duration = absl::Seconds(seconds);
    parsed = true;
  }
  if (!parsed || duration <= absl::ZeroDuration() || duration > absl::Hours(24)) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", Abseil(text),
                     "\" must be a time like 250ms, 5s or 1m30s, more than 0 and at most ", "24h"));
  }
  return duration;
}

absl::StatusOr<uint64_t> ParseId(std::string_view text) {
  uint64_t id = 0;
  const bool hex = text.find_first_not_of("0123456789abcdefABCDEF") == text.npos;
  if (!hex || text.size() > 16 || !absl::SimpleHexAtoi(Abseil(text), &id) || id == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", Abseil(text), "\" must be 1 to 16 hex digits, not all 0"));
  }
  return id;
}

CLI::Option* AddNumber(CLI::App& app, const std::string& name, uint64_t& value, uint64_t min,
                       uint64_t max, const std::string& help) {
  return AddParsed<uint64_t>(
      app, name, value, [min, max](const std::string& text) { return ParseNumber(text, min, max); },
      "N", help);
}

CLI::Option* AddReal(CLI::App& app, const std::string& name, double& value, double min, double max,
                     const std::string& help) {
  return AddParsed<double>(
      app, name, value, [min, max](const std::string& text) { return ParseReal(text, min, max); },
      "X", help);
}

CLI::Option* AddBytes(CLI::App& app, const std::string& name, uint64_t& value, uint64_t min,
                      const std::string& help) {
  return AddParsed<uint64_t>(
      app, name, value,
      [min](const std::string& text) -> absl::StatusOr<uint64_t> {
        const std::optional<uint64_t> bytes = ParseBytes(text);
        if (bytes.has_value() && *bytes >= min) return *bytes;
        return absl::InvalidArgumentError(
            absl::StrCat("\"", text, "\" must be a size like 512MiB or 8GiB, at least ", min));
      },
      "SIZE", help);
}

CLI::Option* AddDuration(CLI::App& app, const std::string& name, absl::Duration& value,
                         const std::string& help) {
  return AddParsed<absl::Duration>(
      app, name, value, [](const std::string& text) { return ParseDuration(text); }, "TIME", help);
}

CLI::Option* AddId(CLI::App& app, const std::string& name, uint64_t& value,
                   const std::string& help) {
  return AddParsed<uint64_t>(
      app, name, value, [](const std::string& text) { return ParseId(text); }, "HEX", help);
}

CLI::Option* AddDType(CLI::App& app, const std::string& name, v1::DType& value,
                      const std::string& help) {
  return AddParsed<v1::DType>(
      app, name, value, [](const std::string& text) { return ParseDType(text); }, "TYPE", help);
}

CLI::Option* AddTier(CLI::App& app, const std::string& name, v1::Tier& value, bool nvme,
                     const std::string& help) {
  return AddParsed<v1::Tier>(
      app, name, value,
      [nvme](const std::string& text) -> absl::StatusOr<v1::Tier> {
        absl::StatusOr<v1::Tier> tier = ParseTier(text);
        if (tier.ok() && (nvme || *tier != v1::TIER_NVME)) return tier;
        return absl::InvalidArgumentError(
            absl::StrCat("\"", text, "\" must be one of gpu, host", nvme ? ", nvme" : ""));
      },
      "TIER", help);
}

absl::StatusOr<std::vector<uint32_t>> ParseTokens(std::string_view text, std::string_view source,
                                                  bool lines) {
  constexpr std::string_view kSeparators = ", \t\r\n";
  std::vector<uint32_t> tokens;
  uint64_t line = 1;
  for (size_t at = 0; at < text.size();) {
    if (kSeparators.find(text[at]) != kSeparators.npos) {
      line += text[at++] == '\n';
      continue;
    }
    const size_t end = std::min(text.find_first_of(kSeparators, at), text.size());
    const std::string_view item = text.substr(at, end - at);
    absl::StatusOr<uint64_t> token = ParseNumber(item, 0, std::numeric_limits<uint32_t>::max());
    if (!token.ok()) {
      return BadToken(lines ? absl::StrCat(Abseil(source), ":", line) : std::string(source), item);
    }
    tokens.push_back(static_cast<uint32_t>(*token));
    at = end;
  }
  if (absl::Status count = CheckTokenCount(source, tokens.size()); !count.ok()) return count;
  return tokens;
}

}  // namespace larder::cli
