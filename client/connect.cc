#include "client/connect.h"

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "client/json.h"

namespace larder::cli {

absl::StatusOr<Client> ConnectTo(const Invocation& invocation) {
  ClientOptions options;
  options.call_timeout = invocation.timeout;
  options.connect_timeout = invocation.timeout;
  return Client::Connect(invocation.address, options);
}

ExitCode ExitCodeOf(const absl::Status& status) {
  if (status.ok()) return kOk;
  if (absl::IsUnavailable(status)) return kUnreachable;
  if (absl::IsInvalidArgument(status)) return kUsage;
  return kFailed;
}

int Fail(const Invocation& invocation, std::string_view command, const absl::Status& error) {
  const std::string code = absl::StatusCodeToString(error.code());
  const std::string message(error.message());
  std::fprintf(stderr, "larder %.*s: %s: %s\n", static_cast<int>(command.size()), command.data(),
               code.c_str(), message.c_str());
  if (invocation.json) {
    std::puts(Dump({{"error", {{"code", code}, {"message", message}}}}).c_str());
  }
  return ExitCodeOf(error);
}

}  // namespace larder::cli
