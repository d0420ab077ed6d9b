#include "storage/nvme_directory.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "storage/errno_status.h"
#include "storage/nvme_format.h"
#include "storage/types.h"

namespace larder {
namespace {

constexpr char kLockName[] = "/LOCK";
constexpr char kFormatName[] = "/FORMAT";
constexpr size_t kTextMax = 256;
constexpr size_t kTextShown = 64;  // of one that is not ours, in messages
constexpr char kSlabWord[] = "slab ";
// A tier of fewer slabs than this is laid out anew.
constexpr uint64_t kSlabsMin = 4;

// What a small file says; at most kTextMax bytes of it.
std::string ReadText(int fd) {
  char buffer[kTextMax];
  const ssize_t n = ::pread(fd, buffer, sizeof(buffer), 0);
  return n > 0 ? std::string(buffer, static_cast<size_t>(n)) : std::string();
}

// What may lie in the directory of a tier that is not there yet: its lock, a FORMAT that a
// crash left half made, and what a freshly made file system brings along.
bool IsNobodys(absl::string_view name) {
  return name == "LOCK" || name == "FORMAT.new" || name == "lost+found";
}

// The first entry that is somebody's; "" when there is none.
absl::StatusOr<std::string> SomebodysEntry(const std::string& path) {
  std::error_code error;
  for (std::filesystem::directory_iterator it(path, error), end; !error && it != end;
       it.increment(error)) {
    std::string name = it->path().filename();
    if (!IsNobodys(name)) return name;
  }
  if (!error) return std::string();
  return ErrnoStatus(absl::StrCat("nvme directory ", path, ": listing it"), error.value());
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

// Without touching anything: whose directory this is, and its slab size.
absl::StatusOr<NvmeDirectory::Content> NvmeDirectory::Look() {
  const std::string path = path_ + kFormatName;
  // A FIFO of this name would be waited for.
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  if (!fd) {
    if (errno != ENOENT) return ErrnoStatus(absl::StrCat("nvme directory: opening ", path), errno);
    // FORMAT comes first in a new directory, so whatever is there without it is not ours.
    absl::StatusOr<std::string> entry = SomebodysEntry(path_);
    if (!entry.ok()) return entry.status();
    if (entry->empty()) return Content::kEmpty;
    // Another daemon has made the tier since.
    if (::access(path.c_str(), F_OK) == 0) return Look();
    return absl::FailedPreconditionError(absl::StrCat("nvme directory ", path_,
                                                      " has no FORMAT but other content (", *entry,
                                                      "); choose an empty one"));
  }
  const std::string text = ReadText(fd.get());
  absl::string_view rest = text;
  bool known = absl::ConsumePrefix(&rest, kNvmeFormatText);
  if (known && !rest.empty()) {
    known = absl::ConsumePrefix(&rest, kSlabWord) && absl::ConsumeSuffix(&rest, "\n") &&
            absl::SimpleAtoi(rest, &slab_bytes_) && slab_bytes_ % kSlotGranule == 0;
  }
  if (known) return Content::kTier;
  return absl::FailedPreconditionError(absl::StrCat(
      "nvme directory ", path_, ": FORMAT is \"", absl::CEscape(text.substr(0, kTextShown)),
      "\", this build knows \"",
      absl::CEscape(kNvmeFormatText),
      "\" only; start the version that wrote it, or empty the directory (its cache is lost)"));
}

absl::Status NvmeDirectory::Lock() {
  const std::string path = path_ + kLockName;
  lock_ = UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0640));
  if (!lock_) return ErrnoStatus(absl::StrCat("nvme directory: opening ", path), errno);
  if (::flock(lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK)
      return ErrnoStatus(absl::StrCat("nvme directory: locking ", path), errno);
    const std::string holder(absl::StripAsciiWhitespace(ReadText(lock_.get())));
    return absl::FailedPreconditionError(
        absl::StrCat("nvme directory ", path_, " is in use by process ",
                     holder.empty() ? "(it has just started)" : holder,
                     "; stop it or choose another directory"));
  }
  const std::string pid = absl::StrCat(::getpid(), "\n");
  if (::ftruncate(lock_.get(), 0) != 0 ||
      ::pwrite(lock_.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    return ErrnoStatus(absl::StrCat("nvme directory: writing ", path), errno);
  }
  return absl::OkStatus();
}

absl::Status NvmeDirectory::WriteFormat() {
  std::string text = kNvmeFormatText;
  if (slab_bytes_ != 0) absl::StrAppend(&text, kSlabWord, slab_bytes_, "\n");
  return WriteTextAtomically(path_, path_ + kFormatName, text);
}

// FORMAT is written only where it says something new.
absl::Status NvmeDirectory::ChooseSlab(Content found, uint64_t wanted) {
  const bool keep = found == Content::kTier && (wanted == 0 || wanted == slab_bytes_ ||
                                                (slab_bytes_ != 0 &&
                                                 slab_bytes_ <= slots_bytes_ / kSlabsMin));
  if (keep) return absl::OkStatus();
  slab_bytes_ = wanted;
  return WriteFormat();
}

absl::Status NvmeDirectory::OpenFile(int flags, bool direct_io) {
  const std::string path = slots_path();
  direct_ = direct_io;
  if (direct_io) {
    slots_ = UniqueFd(::open(path.c_str(), flags | O_DIRECT | O_CLOEXEC, 0640));
    // Some file systems know no O_DIRECT; the page cache does then.
    if (!slots_ && errno == EINVAL) direct_ = false;
  }
  if (!direct_) slots_ = UniqueFd(::open(path.c_str(), flags | O_CLOEXEC, 0640));
  if (!slots_) return ErrnoStatus(absl::StrCat("nvme directory: opening ", path), errno);
  return absl::OkStatus();
}

absl::Status NvmeDirectory::OpenSlots(bool direct_io) {
  if (absl::Status status = OpenFile(O_RDWR | O_CREAT, direct_io); !status.ok()) return status;
  const std::string path = slots_path();
  absl::Status status = Preallocate(slots_.get(), slots_bytes_ + kSlotGranule, path);
  if (!status.ok()) return status;
  if (::fsync(slots_.get()) != 0) return ErrnoStatus(absl::StrCat(path, ": fsync"), errno);
  return SyncFolder(path_);
}

absl::StatusOr<std::unique_ptr<NvmeDirectory>> NvmeDirectory::Open(const Options& options) {
  const std::string& path = options.path;
  if (options.slots_bytes == 0 || options.slots_bytes % kSlotGranule != 0) {
    return absl::InvalidArgumentError(absl::StrCat("nvme directory ", path, ": bytes is ",
                                                   options.slots_bytes,
                                                   ", must be a positive multiple of 4096"));
  }
  if (::mkdir(path.c_str(), 0750) != 0 && errno != EEXIST) {
    return ErrnoStatus(absl::StrCat("nvme directory: creating ", path), errno);
  }
  std::unique_ptr<NvmeDirectory> directory(new NvmeDirectory(path));
  directory->slots_bytes_ = options.slots_bytes;
  // Once before the lock, which is a file too, and once when nobody else can change it.
  absl::StatusOr<Content> found = directory->Look();
  if (!found.ok()) return found.status();
  absl::Status status = directory->Lock();
  if (status.ok()) {
    found = directory->Look();
    status = found.status();
  }
  if (status.ok()) status = directory->ChooseSlab(*found, options.slab_bytes);
  if (status.ok()) status = directory->OpenSlots(options.direct_io);
  if (!status.ok()) return status;
  return directory;
}

absl::StatusOr<std::unique_ptr<NvmeDirectory>> NvmeDirectory::OpenExisting(
    const std::string& path) {
  std::unique_ptr<NvmeDirectory> directory(new NvmeDirectory(path));
  absl::StatusOr<Content> found = directory->Look();
  if (absl::IsUnavailable(found.status()) || (found.ok() && *found == Content::kEmpty)) {
    return absl::FailedPreconditionError(
        absl::StrCat("nvme directory ", path, " holds no NVMe tier",
                     found.ok() ? "" : absl::StrCat(": ", found.status().message())));
  }
  if (!found.ok()) return found.status();
  absl::Status status = directory->Lock();
  if (status.ok()) status = directory->OpenFile(O_RDONLY, /*direct_io=*/true);
  struct stat info;
  if (status.ok() && ::fstat(directory->slots_.get(), &info) != 0) {
    status = ErrnoStatus(absl::StrCat(directory->slots_path(), ": fstat"), errno);
  }
  if (!status.ok()) return status;
  // Less the page for probes.
  const auto bytes = static_cast<uint64_t>(info.st_size);
  directory->slots_bytes_ = bytes < kSlotGranule ? 0 : bytes - kSlotGranule;
  return directory;
}

}  // namespace larder
