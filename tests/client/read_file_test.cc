#include "client/read_file.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace larder::cli {
namespace {

class ReadFileTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_NE(mkdtemp(directory_.data()), nullptr); }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::string directory_ = (std::filesystem::temp_directory_path() / "larder-XXXXXX").string();
};

TEST_F(ReadFileTest, ReadsUpToItsBound) {
  const std::string path = directory_ + "/file";
  const std::string text(3'000'000, 'x');
  std::ofstream(path) << text;
  EXPECT_EQ(*ReadFile("--data", path, text.size()), text);
  EXPECT_EQ(ReadFile("--data", path, text.size() - 1).status(),
            absl::InvalidArgumentError("--data: \"" + path +
                                       "\" has more bytes than the 2999999 that are allowed"));
  std::ofstream(path, std::ios::trunc).close();
  EXPECT_EQ(*ReadFile("--data", path, 0), "");
}

TEST_F(ReadFileTest, SaysWhyNot) {
  EXPECT_EQ(ReadFile("--model", directory_, 10).status(),
            absl::InvalidArgumentError("--model: \"" + directory_ + "\": Is a directory"));
  EXPECT_EQ(ReadFile("--model", directory_ + "/none", 10).status(),
            absl::InvalidArgumentError("--model: \"" + directory_ +
                                       "/none\": No such file or directory"));
}

TEST_F(ReadFileTest, EndlessFilesEnd) {
  EXPECT_TRUE(absl::IsInvalidArgument(ReadFile("--data", "/dev/zero", 10'000'000).status()));
}

}  // namespace
}  // namespace larder::cli
