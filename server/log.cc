#include "server/log.h"

#include <spdlog/formatter.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"

namespace larder {
namespace {

// Between the event, the keys and the values of one line on their way through spdlog.
constexpr char kSeparator = '\x1f';

void AppendQuoted(absl::string_view text, std::string& out) {
  out.push_back('"');
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          absl::StrAppendFormat(&out, "\\u%04x", c);
        } else {
          out.push_back(c);
        }
    }
  }
  out.push_back('"');
}

// A value as it is, quoted only where it would not read back as one word.
void AppendWord(absl::string_view text, std::string& out) {
  const bool plain = !text.empty() && text.find_first_of(" \"=\n\t\\") == absl::string_view::npos;
  if (plain) {
    out.append(text.data(), text.size());
  } else {
    AppendQuoted(text, out);
  }
}

std::string TextLine(absl::string_view time, absl::string_view level,
                     const std::vector<absl::string_view>& parts) {
  std::string line = absl::StrFormat("%s %-7s %s", time, level, parts[0]);
  for (size_t i = 1; i + 1 < parts.size(); i += 2) {
    absl::StrAppend(&line, " ", parts[i], "=");
    AppendWord(parts[i + 1], line);
  }
  return line;
}

std::string JsonLine(absl::string_view time, absl::string_view level,
                     const std::vector<absl::string_view>& parts) {
  std::string line = absl::StrCat("{\"time\":\"", time, "\",\"level\":\"", level, "\",\"event\":");
  AppendQuoted(parts[0], line);
  for (size_t i = 1; i + 1 < parts.size(); i += 2) {
    line.push_back(',');
    AppendQuoted(parts[i], line);
    line.push_back(':');
    AppendQuoted(parts[i + 1], line);
  }
  line.push_back('}');
  return line;
}

class LineFormatter final : public spdlog::formatter {
 public:
  explicit LineFormatter(bool json) : json_(json) {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    const std::string time = absl::FormatTime("%Y-%m-%d%ET%H:%M:%E3SZ",
                                              absl::FromChrono(message.time), absl::UTCTimeZone());
    const auto level = spdlog::level::to_string_view(message.level);
    const std::vector<absl::string_view> parts = absl::StrSplit(
        absl::string_view(message.payload.data(), message.payload.size()), kSeparator);
    std::string line =
        (json_ ? JsonLine : TextLine)(time, absl::string_view(level.data(), level.size()), parts);
    line.push_back('\n');
    out.append(line.data(), line.data() + line.size());
  }

  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<LineFormatter>(json_);
  }

 private:
  const bool json_;
};

}  // namespace

void InitLog(LogLevel least, bool json) {
  auto logger = std::make_shared<spdlog::logger>("larderd",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_formatter(std::make_unique<LineFormatter>(json));
  logger->set_level(static_cast<spdlog::level::level_enum>(least));
  logger->flush_on(spdlog::level::debug);
  spdlog::set_default_logger(std::move(logger));
}

void Log(LogLevel level, std::string_view event, std::initializer_list<LogField> fields) {
  std::string line(event);
  for (const LogField& field : fields) {
    line.push_back(kSeparator);
    line += field.key;
    line.push_back(kSeparator);
    line += field.value;
  }
  spdlog::default_logger_raw()->log(static_cast<spdlog::level::level_enum>(level),
                                    spdlog::string_view_t(line.data(), line.size()));
}

}  // namespace larder
