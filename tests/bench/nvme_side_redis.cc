#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "child.h"
#include "nvme_side.h"
#include "storage/check.h"
#include "storage/errno_status.h"
#include "storage/unique_fd.h"

namespace larder::bench {
namespace {

constexpr char kProgram[] = "/usr/bin/redis-server";
constexpr size_t kPipelined = 8;

class RedisSide final : public ServerSide {
 public:
  RedisSide(std::unique_ptr<Child> server, UniqueFd socket, const Blocks& blocks)
      : server_(std::move(server)), socket_(std::move(socket)), blocks_(blocks) {}

  absl::Status Write(std::span<const uint32_t> blocks) override {
    return Pipelined(
        blocks, [&](uint32_t block) { return SendSet(block); },
        [&](uint32_t) {
          const absl::StatusOr<std::string> line = ReadLine();
          if (line.ok() && *line != "+OK") return absl::UnavailableError(*line);
          return line.status();
        });
  }

  absl::Status Read(std::span<const uint32_t> blocks) override {
    return Pipelined(
        blocks,
        [&](uint32_t block) {
          const std::string key = absl::StrCat(block);
          return SendAll(absl::StrCat("*2\r\n$3\r\nGET\r\n$", key.size(), "\r\n", key, "\r\n"));
        },
        [&](uint32_t block) { return ReadValue(blocks_.To(block)); });
  }

  void Kill() override { server_->Kill(); }

 private:
  template <typename SendFn, typename ReceiveFn>
  absl::Status Pipelined(std::span<const uint32_t> blocks, SendFn send, ReceiveFn receive) {
    for (size_t at = 0; at < blocks.size(); at += kPipelined) {
      const auto batch = blocks.subspan(at, std::min(kPipelined, blocks.size() - at));
      for (const uint32_t block : batch) {
        if (absl::Status status = send(block); !status.ok()) return status;
      }
      for (const uint32_t block : batch) {
        if (absl::Status status = receive(block); !status.ok()) return status;
      }
    }
    return absl::OkStatus();
  }

  absl::Status SendSet(uint32_t block) {
    const std::string key = absl::StrCat(block);
    const std::span<const std::byte> bytes = blocks_.From(block);
    absl::Status status = SendAll(absl::StrCat("*3\r\n$3\r\nSET\r\n$", key.size(), "\r\n", key,
                                               "\r\n$", bytes.size(), "\r\n"));
    if (status.ok()) {
      status = SendAll({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    }
    return status.ok() ? SendAll("\r\n") : status;
  }

  absl::Status SendAll(absl::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (n < 0) return ErrnoStatus("redis: send", errno);
      bytes.remove_prefix(static_cast<size_t>(n));
    }
    return absl::OkStatus();
  }

  // What is buffered first, then from the socket straight to where it belongs.
  absl::Status ReceiveAll(std::span<std::byte> to) {
    const size_t buffered = std::min(to.size(), buffer_.size());
    std::memcpy(to.data(), buffer_.data(), buffered);
    buffer_.erase(0, buffered);
    to = to.subspan(buffered);
    while (!to.empty()) {
      const ssize_t n = ::recv(socket_.get(), to.data(), to.size(), 0);
      if (n <= 0) return ErrnoStatus("redis: recv", errno);
      to = to.subspan(static_cast<size_t>(n));
    }
    return absl::OkStatus();
  }

  // Without its end.
  absl::StatusOr<std::string> ReadLine() {
    while (true) {
      if (const size_t end = buffer_.find("\r\n"); end != std::string::npos) {
        std::string line = buffer_.substr(0, end);
        buffer_.erase(0, end + 2);
        return line;
      }
      char more[512];
      const ssize_t n = ::recv(socket_.get(), more, sizeof(more), 0);
      if (n <= 0) return ErrnoStatus("redis: recv", errno);
      buffer_.append(more, static_cast<size_t>(n));
    }
  }

  absl::Status ReadValue(std::span<std::byte> to) {
    const absl::StatusOr<std::string> line = ReadLine();
    if (!line.ok()) return line.status();
    uint64_t bytes = 0;
    if (line->empty() || (*line)[0] != '$' || !absl::SimpleAtoi(line->substr(1), &bytes) ||
        bytes != to.size()) {
      return absl::DataLossError(absl::StrCat("redis answered ", *line));
    }
    absl::Status status = ReceiveAll(to);
    std::byte end[2];
    return status.ok() ? ReceiveAll(end) : status;
  }

  const std::unique_ptr<Child> server_;
  const UniqueFd socket_;
  const Blocks& blocks_;
  std::string buffer_;  // received and not yet used
};

absl::StatusOr<UniqueFd> Connect(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  LARDER_CHECK(path.size() < sizeof(address.sun_path), "the folder's name is too long");
  std::memcpy(address.sun_path, path.data(), path.size());
  for (int tries = 0; tries < 500; ++tries) {
    UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
      return socket;
    }
    absl::SleepFor(absl::Milliseconds(10));
  }
  return ErrnoStatus("redis: connect", errno);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ServerSide>> MakeRedisSide(const std::string& path,
                                                          const Blocks& blocks, RedisSync sync) {
  if (::access(kProgram, X_OK) != 0) return absl::NotFoundError("redis-server is not installed");
  // It changes its folder.
  const std::string folder = std::filesystem::absolute(path);
  LARDER_CHECK(::mkdir(folder.c_str(), 0700) == 0 || errno == EEXIST);
  const std::string socket_path = folder + "/socket";
  ::unlink(socket_path.c_str());  // of one that was killed
  // It would die of the pipe that Child closes after the first line.
  auto server = Child::Start({"/bin/sh", "-c", "echo; exec \"$0\" \"$@\" >/dev/null", kProgram,
                              "--port", "0", "--unixsocket", socket_path, "--dir", folder, "--save",
                              "", "--appendonly", "yes", "--appendfsync",
                              sync == RedisSync::kAlways ? "always" : "everysec"});
  if (!server.ok()) return server.status();
  auto socket = Connect(socket_path);
  if (!socket.ok()) return socket.status();
  return std::make_unique<RedisSide>(*std::move(server), *std::move(socket), blocks);
}

}  // namespace larder::bench
