#include "storage/io_transfer.h"

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "storage/check.h"
#include "storage/errno_status.h"
#include "storage/types.h"

namespace larder {
namespace {

constexpr uint64_t kPage = kSlotGranule;
// A call that is put off so often in a row will be put off for ever.
constexpr int kTriesMax = 1000;

bool IsAligned(const std::byte* p) { return reinterpret_cast<uintptr_t>(p) % kPage == 0; }

}  // namespace

IoTransfer::IoTransfer(IoJob job, bool direct)
    : job_(std::move(job)), file_bytes_((job_.bytes + kPage - 1) / kPage * kPage) {
  in_place_ = !direct || IsAligned(job_.memory) ? job_.bytes / kPage * kPage : 0;
  const uint64_t ours = file_bytes_ - in_place_;
  if (ours == 0) return;
  pages_.reset(static_cast<std::byte*>(std::aligned_alloc(kPage, ours)));
  LARDER_CHECK(pages_ != nullptr, "out of memory for an I/O operation's pages");
  if (!job_.write) return;
  const uint64_t rest = job_.bytes - in_place_;
  std::memcpy(pages_.get(), job_.memory + in_place_, rest);
  std::memset(pages_.get() + rest, 0, ours - rest);
}

std::span<const iovec> IoTransfer::Left() {
  size_t count = 0;
  if (moved_ < in_place_) left_[count++] = {job_.memory + moved_, in_place_ - moved_};
  if (in_place_ < file_bytes_) {
    const uint64_t at = moved_ < in_place_ ? 0 : moved_ - in_place_;
    left_[count++] = {pages_.get() + at, file_bytes_ - in_place_ - at};
  }
  return {left_.data(), count};
}

bool IoTransfer::Advance(int64_t result) {
  if (result == -EINTR || result == -EAGAIN) {
    if (++tries_ < kTriesMax) return false;
    error_ = static_cast<int>(-result);
    return true;
  }
  if (result < 0) {
    error_ = static_cast<int>(-result);
    return true;
  }
  // Part of a page is moved again: what is left must start on one.
  const uint64_t moved = static_cast<uint64_t>(result) / kPage * kPage;
  if (moved == 0) {
    if (result > 0 && ++tries_ < kTriesMax) return false;
    ended_ = true;
    return true;
  }
  tries_ = 0;
  moved_ += moved;
  return moved_ == file_bytes_;
}

void IoTransfer::Finish(const std::string& name) {
  absl::Status status = Result(name);
  if (status.ok() && !job_.write && pages_ != nullptr) {
    std::memcpy(job_.memory + in_place_, pages_.get(), job_.bytes - in_place_);
  }
  pages_.reset();
  const IoBackend::DoneFn done = std::exchange(job_.done, nullptr);
  done(std::move(status));
}

absl::Status IoTransfer::Result(const std::string& name) const {
  if (error_ == 0 && !ended_) return absl::OkStatus();
  const std::string what = absl::StrCat(name, ": ", job_.write ? "writing " : "reading ",
                                        job_.bytes, " bytes at ", job_.offset);
  if (ended_) return absl::DataLossError(absl::StrCat(what, ": the file ends before"));
  return ErrnoStatus(what, error_);
}

}  // namespace larder
