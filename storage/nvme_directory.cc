#include "storage/nvme_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <cerrno>
#include <cstdio>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "storage/errno_status.h"
#include "storage/nvme_format.h"
#include "storage/types.h"

namespace larder {
namespace {

constexpr char kLockName[] = "/LOCK";
constexpr char kFormatName[] = "/FORMAT";
constexpr size_t kTextMax = 256;

// What a small file says; at most kTextMax bytes of it.
std::string ReadText(int fd) {
  char buffer[kTextMax];
  const ssize_t n = ::pread(fd, buffer, sizeof(buffer), 0);
  return n > 0 ? std::string(buffer, static_cast<size_t>(n)) : std::string();
}

bool Exists(const std::string& path) {
  struct stat info;
  return ::stat(path.c_str(), &info) == 0;
}

absl::Status SyncFolder(const std::string& path) {
  UniqueFd folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!folder || ::fsync(folder.get()) != 0) {
    return ErrnoStatus(absl::StrCat("nvme directory ", path, ": fsync"), errno);
  }
  return absl::OkStatus();
}

// All of the text or none of it, also after a crash.
absl::Status WriteTextAtomically(const std::string& folder, const std::string& path,
                                 absl::string_view text) {
  const std::string temporary = path + ".new";
  UniqueFd fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0640));
  if (!fd || ::write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      ::fsync(fd.get()) != 0 || ::rename(temporary.c_str(), path.c_str()) != 0) {
    return ErrnoStatus(absl::StrCat("nvme directory: writing ", path), errno);
  }
  return SyncFolder(folder);
}

uint64_t DiskFree(int fd) {
  struct statvfs info;
  return ::fstatvfs(fd, &info) == 0 ? uint64_t{info.f_bavail} * info.f_frsize : 0;
}

absl::Status DiskTooSmall(const std::string& path, uint64_t bytes, uint64_t has, uint64_t free) {
  return absl::ResourceExhaustedError(
      absl::StrCat(path, ": bytes is ", bytes, " with the probe page, but beside the ", has,
                   " that it has the disk has only ", free, " free"));
}

// Gives the file exactly `bytes`, with blocks behind all of them. Looks first: an fallocate
// that fails has filled the disk meanwhile, under everybody else.
absl::Status Preallocate(int fd, uint64_t bytes, const std::string& path) {
  struct stat before;
  if (::fstat(fd, &before) != 0) return ErrnoStatus(absl::StrCat(path, ": fstat"), errno);
  const uint64_t has = static_cast<uint64_t>(before.st_blocks) * 512;
  const uint64_t free = DiskFree(fd);
  if (bytes > has && bytes - has > free) return DiskTooSmall(path, bytes, has, free);
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    if (errno == EFBIG) return DiskTooSmall(path, bytes, has, free);
    return ErrnoStatus(absl::StrCat(path, ": ftruncate to ", bytes), errno);
  }
  int error;
  do {
    error = ::fallocate(fd, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == 0) return absl::OkStatus();
  // Somebody else was faster, or a quota: what was taken is given back.
  if (static_cast<uint64_t>(before.st_size) < bytes) (void)!::ftruncate(fd, before.st_size);
  if (error == ENOSPC || error == EDQUOT) return DiskTooSmall(path, bytes, has, DiskFree(fd));
  return ErrnoStatus(absl::StrCat(path, ": fallocate of ", bytes), error);
}

}  // namespace

absl::Status NvmeDirectory::Lock() {
  const std::string path = path_ + kLockName;
  lock_ = UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0640));
  if (!lock_) return ErrnoStatus(absl::StrCat("nvme directory: opening ", path), errno);
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK)
      return ErrnoStatus(absl::StrCat("nvme directory: locking ", path), errno);
    const std::string holder(absl::StripAsciiWhitespace(ReadText(lock_.get())));
    return absl::FailedPreconditionError(absl::StrCat("nvme directory ", path_,
                                                      " is in use by process ", holder,
                                                      "; stop it or choose another directory"));
  }
  const std::string pid = absl::StrCat(::getpid(), "\n");
  if (::ftruncate(lock_.get(), 0) != 0 ||
      ::pwrite(lock_.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return ErrnoStatus(absl::StrCat("nvme directory: writing ", path), errno);
  }
  return absl::OkStatus();
}

absl::Status NvmeDirectory::CheckFormat() {
  const std::string path = path_ + kFormatName;
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) {
    if (errno != ENOENT) return ErrnoStatus(absl::StrCat("nvme directory: opening ", path), errno);
    // FORMAT comes first in a new directory, so these without it are somebody else's.
    if (Exists(slots_path()) || Exists(index_path())) {
      return absl::FailedPreconditionError(absl::StrCat(
          "nvme directory ", path_, " has no FORMAT but other content; choose an empty one"));
    }
    return WriteTextAtomically(path_, path, kNvmeFormatText);
  }
  const std::string text = ReadText(fd.get());
  if (text == kNvmeFormatText) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "nvme directory ", path_, ": FORMAT is \"", absl::CEscape(text), "\", this build knows \"",
      absl::CEscape(kNvmeFormatText),
      "\" only; start the version that wrote it, or empty the directory (its cache is lost)"));
}

absl::Status NvmeDirectory::OpenSlots(uint64_t bytes, bool direct_io) {
  const std::string path = slots_path();
  const int flags = O_RDWR | O_CREAT | O_CLOEXEC;
  direct_ = direct_io;
  if (direct_io) {
    slots_ = UniqueFd(::open(path.c_str(), flags | O_DIRECT, 0640));
    // Some file systems know no O_DIRECT; the page cache does then.
    if (!slots_ && errno == EINVAL) direct_ = false;
  }
  if (!direct_) slots_ = UniqueFd(::open(path.c_str(), flags, 0640));
  if (!slots_) return ErrnoStatus(absl::StrCat("nvme directory: opening ", path), errno);
  if (absl::Status status = Preallocate(slots_.get(), bytes + kSlotGranule, path); !status.ok()) {
    return status;
  }
  if (::fsync(slots_.get()) != 0) return ErrnoStatus(absl::StrCat(path, ": fsync"), errno);
  return SyncFolder(path_);
}

absl::StatusOr<std::unique_ptr<NvmeDirectory>> NvmeDirectory::Open(const std::string& path,
                                                                   uint64_t slots_bytes,
                                                                   bool direct_io) {
  if (slots_bytes == 0 || slots_bytes % kSlotGranule != 0) {
    return absl::InvalidArgumentError(absl::StrCat("nvme directory ", path, ": bytes is ",
                                                   slots_bytes,
                                                   ", must be a positive multiple of 4096"));
  }
  if (::mkdir(path.c_str(), 0750) != 0 && errno != EEXIST) {
    return ErrnoStatus(absl::StrCat("nvme directory: creating ", path), errno);
  }
  std::unique_ptr<NvmeDirectory> directory(new NvmeDirectory(path));
  absl::Status status = directory->Lock();
  if (status.ok()) status = directory->CheckFormat();
  if (status.ok()) status = directory->OpenSlots(slots_bytes, direct_io);
  if (!status.ok()) return status;
  return directory;
}

}  // namespace larder
