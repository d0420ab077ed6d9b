#include "client/worker/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder::worker {
namespace {

absl::Status ErrnoAt(const std::string& path, int error) {
  return absl::ErrnoToStatus(error, path);
}

}  // namespace

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return ErrnoAt(path, errno);
  struct stat status = {};
  void* memory = MAP_FAILED;
  int error = 0;
  if (::fstat(fd, &status) != 0) {
    error = errno;
  } else if (S_ISREG(status.st_mode) && status.st_size > 0) {
    memory = ::mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
    if (memory == MAP_FAILED) error = errno;
  }
  ::close(fd);  // the mapping outlives it
  if (error != 0) return ErrnoAt(path, error);
  if (memory == MAP_FAILED) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": allowed: a regular file, not empty"));
  }
  return MappedFile(
      std::span(static_cast<const std::byte*>(memory), static_cast<size_t>(status.st_size)));
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace larder::worker
