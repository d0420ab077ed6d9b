#include "storage/nvme_audit.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "storage/errno_status.h"
#include "storage/nvme_records.h"

namespace larder {
namespace {

uint64_t Padded(uint64_t bytes) { return (bytes + kSlotGranule - 1) / kSlotGranule * kSlotGranule; }

// Aligned as O_DIRECT wants it; touched only as far as payloads reach.
class Buffer {
 public:
  explicit Buffer(uint64_t bytes)
      : memory_(static_cast<std::byte*>(std::aligned_alloc(kSlotGranule, Padded(bytes)))),
        bytes_(Padded(bytes)) {}
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::span<std::byte> span() const { return {memory_, memory_ == nullptr ? 0 : bytes_}; }

 private:
  std::byte* const memory_;
  const uint64_t bytes_;
};

// Reads all of `to`; the error's text, or "" when it is there.
std::string ReadAll(int fd, uint64_t offset, std::span<std::byte> to) {
  while (!to.empty()) {
    const ssize_t n = ::pread(fd, to.data(), to.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoText(errno);
    if (n == 0) return "the file ends before";
    offset += static_cast<uint64_t>(n);
    to = to.subspan(static_cast<size_t>(n));
  }
  return "";
}

}  // namespace

// What Check keeps of a record. 64 bits of a key stand for it: of ten million blocks two would
// have to agree, once in 400,000 checks.
struct NvmeAudit::Entry {
  uint64_t key = 0;
  uint64_t parent_key = 0;
  uint64_t payload_hash = 0;
  uint64_t model_id = 0;
  Slot slot;
  uint32_t payload_bytes = 0;
  uint32_t depth = 0;

  uint64_t end() const { return slot.offset() + Padded(payload_bytes); }
};

const char* NvmeAudit::Name(Problem problem) {
  constexpr const char* kNames[kProblemCount] = {"damaged record", "outside of the slot file",
                                                 "overlap",        "duplicate",
                                                 "orphan",         "unreadable",
                                                 "wrong checksum"};
  return kNames[static_cast<int>(problem)];
}

absl::StatusOr<std::unique_ptr<NvmeAudit>> NvmeAudit::Open(const std::string& directory) {
  auto opened = NvmeDirectory::OpenExisting(directory);
  if (!opened.ok()) return opened.status();
  return std::unique_ptr<NvmeAudit>(new NvmeAudit(*std::move(opened)));
}

absl::Status NvmeAudit::ForEach(const std::function<void(Slot, const NvmeRecord&)>& visit) const {
  const auto records = NvmeRecords::OpenReadOnly(directory_->index_path());
  if (!records.ok()) return records.status();
  return (*records)->Visit([&](Slot slot, const std::optional<NvmeRecord>& record) {
    if (record) visit(slot, *record);
  });
}

absl::StatusOr<std::vector<NvmeAudit::Entry>> NvmeAudit::Read(
    std::vector<Finding>& findings) const {
  const auto records = NvmeRecords::OpenReadOnly(directory_->index_path());
  if (!records.ok()) return records.status();
  std::vector<Entry> entries;
  absl::Status status = (*records)->Visit([&](Slot slot, const std::optional<NvmeRecord>& record) {
    if (!record) {
      findings.push_back({Problem::kDamagedRecord, slot, 0, slot ? "" : "an unknown key"});
    } else {
      entries.push_back({record->block.key.Prefix64(), record->block.parent_key.Prefix64(),
                         record->payload_hash, record->block.model_id, slot, record->payload_bytes,
                         record->block.depth});
    }
  });
  if (!status.ok()) return status;
  return entries;
}

// Entries are in slot order.
void NvmeAudit::CheckPlaces(const std::vector<Entry>& entries,
                            std::vector<Finding>& findings) const {
  const Entry* furthest = nullptr;
  for (const Entry& entry : entries) {
    if (entry.payload_bytes == 0 || entry.end() > slots_bytes()) {
      findings.push_back({Problem::kOutside, entry.slot, entry.model_id,
                          absl::StrCat("ends at byte ", entry.end(), " of ", slots_bytes())});
    } else if (furthest != nullptr && furthest->end() > entry.slot.offset()) {
      findings.push_back({Problem::kOverlap, entry.slot, entry.model_id,
                          absl::StrCat("with slot ", furthest->slot.number())});
    }
    if (furthest == nullptr || entry.end() > furthest->end()) furthest = &entry;
  }
}

// As a start would see it: from the top, each block needs its parent.
void NvmeAudit::CheckAncestors(std::vector<Entry> entries, std::vector<Finding>& findings) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.depth, a.slot) < std::tie(b.depth, b.slot);
  });
  absl::flat_hash_set<uint64_t> found;
  for (const Entry& entry : entries) {
    if (entry.depth > 0 && !found.contains(entry.parent_key)) {
      findings.push_back({Problem::kOrphan, entry.slot, entry.model_id,
                          absl::StrCat("at depth ", entry.depth)});
    } else if (!found.insert(entry.key).second) {
      findings.push_back({Problem::kDuplicate, entry.slot, entry.model_id, ""});
    }
  }
}

std::optional<NvmeAudit::Finding> NvmeAudit::CheckPayload(const Entry& entry,
                                                          std::span<std::byte> buffer) const {
  const std::span<std::byte> padded = buffer.first(Padded(entry.payload_bytes));
  std::string error = ReadAll(slots_.get(), entry.slot.offset(), padded);
  if (!error.empty()) {
    return Finding{Problem::kUnreadable, entry.slot, entry.model_id, std::move(error)};
  }
  if (PayloadHash(padded.first(entry.payload_bytes)) == entry.payload_hash) return std::nullopt;
  return Finding{Problem::kChecksum, entry.slot, entry.model_id,
                 absl::StrCat(entry.payload_bytes, " bytes")};
}

void NvmeAudit::CheckPayloads(const std::vector<Entry>& entries, int threads,
                              const ProgressFn& progress, std::vector<Finding>& findings) const {
  uint64_t total = 0;
  uint32_t largest = 0;
  for (const Entry& entry : entries) {
    if (entry.end() > slots_bytes()) continue;
    total += entry.payload_bytes;
    largest = std::max(largest, entry.payload_bytes);
  }
  std::atomic<size_t> next{0};
  absl::Mutex mu;  // guards done and findings
  uint64_t done = 0;
  const auto work = [&] {
    const Buffer buffer(largest);
    for (size_t i; (i = next++) < entries.size();) {
      if (entries[i].end() > slots_bytes()) continue;
      std::optional<Finding> finding =
          buffer.span().empty()
              ? Finding{Problem::kUnreadable, entries[i].slot, entries[i].model_id, "no memory"}
              : CheckPayload(entries[i], buffer.span());
      absl::MutexLock lock(&mu);
      if (finding) findings.push_back(*std::move(finding));
      done += entries[i].payload_bytes;
      progress(done, total);
    }
  };
  std::vector<std::thread> workers;
  for (int i = 1; i < threads; ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
}

absl::StatusOr<std::vector<NvmeAudit::Finding>> NvmeAudit::Check(
    int threads, const ProgressFn& progress) const {
  std::vector<Finding> findings;
  const absl::StatusOr<std::vector<Entry>> entries = Read(findings);
  if (!entries.ok()) return entries.status();
  CheckPlaces(*entries, findings);
  CheckAncestors(*entries, findings);
  CheckPayloads(*entries, threads, progress, findings);
  std::sort(findings.begin(), findings.end(), [](const Finding& a, const Finding& b) {
    return std::tie(a.slot, a.problem) < std::tie(b.slot, b.problem);
  });
  return findings;
}

absl::Status NvmeAudit::Erase(std::span<const Slot> slots) {
  const auto records = NvmeRecords::Open(directory_->index_path());
  if (!records.ok()) return records.status();
  // Children first or last makes no difference to a start: orphans are dropped there.
  std::vector<NvmeRecords::Change> changes;
  for (const Slot slot : slots) changes.push_back({slot, std::nullopt});
  return (*records)->Apply(changes, /*sync=*/true);
}

}  // namespace larder
