// Structured logs on stderr: an event and its fields, as text or as JSON lines.
//
//   2026-11-22T17:04:05.123Z info  nvme recovered blocks=1024 took_ms=12
//   {"time":"2026-11-22T17:04:05.123Z","level":"info","event":"nvme recovered","blocks":"1024",..}
//
// Lines of other layers, which log through spdlog's default logger, come out in the same form
// without fields.
//
// Thread safety: InitLog once, before any other thread; Log is thread-safe.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <type_traits>

#include "absl/strings/str_cat.h"

namespace larder {

// Numbers are those of spdlog's levels.
enum class LogLevel : int { kDebug = 1, kInfo = 2, kWarning = 3, kError = 4 };

struct LogField {
  LogField(std::string_view key, std::string_view value) : key(key), value(value) {}
  LogField(std::string_view key, const char* value) : key(key), value(value) {}
  template <typename Number>
  requires std::is_arithmetic_v<Number> LogField(std::string_view key, Number value)
      : key(key), value(absl::StrCat(value)) {}

  std::string_view key;
  std::string value;
};

void InitLog(LogLevel least, bool json);
void Log(LogLevel level, std::string_view event, std::initializer_list<LogField> fields = {});

}  // namespace larder
