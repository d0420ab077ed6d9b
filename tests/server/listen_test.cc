#include "server/listen.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>

#include "storage/unique_fd.h"

namespace larder {
namespace {

class SocketFile : public testing::Test {
 protected:
  SocketFile() {
    char name[] = "/tmp/larder-listen-XXXXXX";
    folder_ = ::mkdtemp(name);
    path_ = folder_ + "/sock";
  }
  ~SocketFile() override { std::filesystem::remove_all(folder_); }

  UniqueFd Bind() const {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path_.data(), path_.size());
    EXPECT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(::listen(fd.get(), 1), 0);
    return fd;
  }

  std::string folder_;
  std::string path_;
};

TEST_F(SocketFile, NothingThere) { EXPECT_TRUE(PrepareSocketFile(path_).ok()); }

TEST_F(SocketFile, DeadDaemonsIsRemoved) {
  Bind();
  ASSERT_TRUE(std::filesystem::exists(path_));
  EXPECT_TRUE(PrepareSocketFile(path_).ok());
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_F(SocketFile, LiveDaemonsIsRefused) {
  const UniqueFd live = Bind();
  const absl::Status status = PrepareSocketFile(path_);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("another process is listening"), absl::string_view::npos);
  EXPECT_TRUE(std::filesystem::exists(path_));
}

TEST_F(SocketFile, OtherFilesAreLeftAlone) {
  UniqueFd file(::open(path_.c_str(), O_CREAT | O_WRONLY, 0600));
  EXPECT_NE(PrepareSocketFile(path_).message().find("is not a socket"), absl::string_view::npos);
  EXPECT_TRUE(std::filesystem::exists(path_));
}

TEST_F(SocketFile, MissingFolder) {
  const absl::Status status = PrepareSocketFile(folder_ + "/none/sock");
  EXPECT_NE(status.message().find(folder_ + "/none"), absl::string_view::npos);
}

TEST(ListenAddress, Kinds) {
  EXPECT_EQ(ParseListenAddress("unix:/a")->name, "/a");
  EXPECT_EQ(ParseListenAddress("unix:///a")->name, "/a");
  EXPECT_EQ(ParseListenAddress("unix-abstract:a")->kind, ListenAddress::Kind::kUnixAbstract);
  EXPECT_EQ(ParseListenAddress("[::1]:80")->name, "::1");
  EXPECT_TRUE(ParseListenAddress("[::1]:80")->loopback);
  EXPECT_FALSE(ParseListenAddress("10.0.0.1:80")->loopback);
  EXPECT_FALSE(ParseListenAddress("127.example.com:80")->loopback);
  EXPECT_EQ(ParseListenAddress("localhost:80")->port, 80);
}

TEST(ListenAddress, NothingThatOthersReadInAnotherWay) {
  for (const char* text : {"::1:80", "[::1:80", "::1]:80", "[::1]", "[]:80", ":80", "80", "",
                           "127.0.0.1: 80", "127.0.0.1:+80", "127.0.0.1:", "127.0.0.1:65536",
                           "127.0.0.1:1,127.0.0.1:2", "local host:80"}) {
    EXPECT_FALSE(ParseListenAddress(text).ok()) << text;
  }
}

}  // namespace
}  // namespace larder
