#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "in_threads.h"
#include "nvme_side.h"
#include "storage/check.h"
#include "storage/errno_status.h"
#include "storage/unique_fd.h"

namespace larder::bench {
namespace {

constexpr int kThreads = 8;

class FilesSide final : public NvmeSide {
 public:
  FilesSide(const std::string& path, const Blocks& blocks) : path_(path), blocks_(blocks) {
    LARDER_CHECK(::mkdir(path.c_str(), 0700) == 0);
  }

  absl::Status Write(std::span<const uint32_t> blocks) override {
    absl::Status status = InThreads(kThreads, blocks, [&](uint32_t block) {
      const std::string name = NameOf(block);
      const std::string aside = name + ".new";
      const UniqueFd file(
          ::open(aside.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT | O_CLOEXEC, 0600));
      const std::span<const std::byte> bytes = blocks_.From(block);
      if (!file ||
          ::pwrite(file.get(), bytes.data(), bytes.size(), 0) !=
              static_cast<ssize_t>(bytes.size()) ||
          ::rename(aside.c_str(), name.c_str()) != 0) {
        return ErrnoStatus(aside, errno);
      }
      return absl::OkStatus();
    });
    const UniqueFd folder(::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (status.ok() && ::syncfs(folder.get()) != 0) status = ErrnoStatus("syncfs", errno);
    return status;
  }

  absl::Status Read(std::span<const uint32_t> blocks) override {
    return InThreads(kThreads, blocks, [&](uint32_t block) {
      const std::string name = NameOf(block);
      const UniqueFd file(::open(name.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
      const std::span<std::byte> bytes = blocks_.To(block);
      if (!file || ::pread(file.get(), bytes.data(), bytes.size(), 0) !=
                       static_cast<ssize_t>(bytes.size())) {
        return ErrnoStatus(name, errno);
      }
      return absl::OkStatus();
    });
  }

 private:
  std::string NameOf(uint32_t block) const { return absl::StrCat(path_, "/", block); }

  const std::string path_;
  const Blocks& blocks_;
};

}  // namespace

std::unique_ptr<NvmeSide> MakeFilesSide(const std::string& path, const Blocks& blocks) {
  return std::make_unique<FilesSide>(path, blocks);
}

}  // namespace larder::bench
