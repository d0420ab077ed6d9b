#include "tests/storage/simulated_files.h"

#include <rocksdb/env.h>
#include <rocksdb/file_system.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace larder::testing {
namespace {

using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

constexpr size_t kSector = 512;

// As RocksDB's own file system tells errors.
IOStatus FromErrno(const std::string& name, int error) {
  const std::string text = std::strerror(error);
  if (error == 0) return IOStatus::OK();
  if (error == ENOENT) return IOStatus::PathNotFound(name, text);
  if (error != ENOSPC) return IOStatus::IOError(name, text);
  IOStatus status = IOStatus::NoSpace(name, text);
  status.SetRetryable(true);
  return status;
}

// One slash between names, none at the end. The root is "".
std::string Normal(const std::string& name) {
  std::string normal;
  for (const char c : name) {
    if (c != '/' || normal.empty() || normal.back() != '/') normal.push_back(c);
  }
  if (!normal.empty() && normal.back() == '/') normal.pop_back();
  return normal;
}

std::string Parent(const std::string& name) { return name.substr(0, name.rfind('/')); }

class NoLog final : public rocksdb::Logger {
 public:
  using Logger::Logv;
  void Logv(const char*, va_list) override {}
  size_t GetLogFileSize() const override { return 0; }
};

class Lock final : public rocksdb::FileLock {
 public:
  explicit Lock(std::string name) : name(std::move(name)) {}
  const std::string name;
};

}  // namespace

class SimulatedFiles::Files final : public rocksdb::FileSystem,
                                    public std::enable_shared_from_this<Files> {
 public:
  Files(uint64_t seed, ErrorFn error) : error_(std::move(error)), random_(seed) {
    names_[""] = durable_names_[""] = NewNode(/*folder=*/true);
  }

  void PowerCut();

  const char* Name() const override { return "SimulatedFiles"; }
  IOStatus NewSequentialFile(const std::string& name, const rocksdb::FileOptions&,
                             std::unique_ptr<rocksdb::FSSequentialFile>* result,
                             IODebugContext*) override {
    return OpenToRead<Sequential>(name, result);
  }
  IOStatus NewRandomAccessFile(const std::string& name, const rocksdb::FileOptions&,
                               std::unique_ptr<rocksdb::FSRandomAccessFile>* result,
                               IODebugContext*) override {
    return OpenToRead<RandomAccess>(name, result);
  }
  IOStatus NewWritableFile(const std::string& name, const rocksdb::FileOptions&,
                           std::unique_ptr<rocksdb::FSWritableFile>* result,
                           IODebugContext*) override;
  IOStatus NewDirectory(const std::string& name, const IOOptions&,
                        std::unique_ptr<rocksdb::FSDirectory>* result, IODebugContext*) override;
  IOStatus FileExists(const std::string& name, const IOOptions&, IODebugContext*) override {
    return Find(name) != nullptr ? IOStatus::OK() : IOStatus::NotFound(name);
  }
  IOStatus GetChildren(const std::string& folder, const IOOptions&,
                       std::vector<std::string>* result, IODebugContext*) override;
  IOStatus DeleteFile(const std::string& name, const IOOptions&, IODebugContext*) override {
    return Change(name, ENOENT, {{Normal(name), nullptr}});
  }
  IOStatus CreateDir(const std::string& name, const IOOptions&, IODebugContext*) override {
    if (Find(name) != nullptr) return IOStatus::IOError(name, "there is one");
    return Change(name, 0, {{Normal(name), NewNode(/*folder=*/true)}});
  }
  IOStatus CreateDirIfMissing(const std::string& name, const IOOptions& options,
                              IODebugContext* debug) override {
    return Find(name) != nullptr ? IOStatus::OK() : CreateDir(name, options, debug);
  }
  IOStatus DeleteDir(const std::string& name, const IOOptions&, IODebugContext*) override {
    return Change(name, ENOENT, {{Normal(name), nullptr}});
  }
  IOStatus GetFileSize(const std::string& name, const IOOptions&, uint64_t* bytes,
                       IODebugContext*) override;
  IOStatus GetFileModificationTime(const std::string&, const IOOptions&, uint64_t* time,
                                   IODebugContext*) override {
    *time = 0;
    return IOStatus::OK();
  }
  IOStatus RenameFile(const std::string& from, const std::string& to, const IOOptions&,
                      IODebugContext*) override {
    return Change(from, ENOENT, {{Normal(from), nullptr}, {Normal(to), Find(from)}});
  }
  IOStatus LockFile(const std::string& name, const IOOptions&, rocksdb::FileLock** lock,
                    IODebugContext*) override;
  IOStatus UnlockFile(rocksdb::FileLock* lock, const IOOptions&, IODebugContext*) override;
  IOStatus GetTestDirectory(const IOOptions&, std::string* path, IODebugContext*) override {
    *path = "/test";
    return IOStatus::OK();
  }
  IOStatus NewLogger(const std::string&, const IOOptions&, std::shared_ptr<rocksdb::Logger>* result,
                     IODebugContext*) override {
    *result = std::make_shared<NoLog>();
    return IOStatus::OK();
  }
  IOStatus GetAbsolutePath(const std::string& name, const IOOptions&, std::string* path,
                           IODebugContext*) override {
    *path = name;
    return IOStatus::OK();
  }
  IOStatus IsDirectory(const std::string& name, const IOOptions&, bool* is,
                       IODebugContext*) override {
    const auto node = Find(name);
    if (node == nullptr) return FromErrno(name, ENOENT);
    *is = node->folder;
    return IOStatus::OK();
  }

 private:
  // A file or a folder, whatever its names are.
  struct Node {
    bool folder = false;
    std::string bytes;
    size_t synced = 0;                           // so many of them
    std::vector<std::pair<size_t, size_t>> lost;  // from, to: dropped by a sync that failed
  };
  using NodePtr = std::shared_ptr<Node>;
  using Names = std::map<std::string, NodePtr>;
  // Of one operation: what each name stands for afterwards; null: nothing.
  using NameChanges = std::vector<std::pair<std::string, NodePtr>>;

  class Sequential;
  class RandomAccess;
  class Writable;
  class Folder;

  static NodePtr NewNode(bool folder) {
    auto node = std::make_shared<Node>();
    node->folder = folder;
    return node;
  }
  static void Apply(const NameChanges& changes, Names& names) {
    for (const auto& [name, node] : changes) {
      if (node == nullptr) {
        names.erase(name);
      } else {
        names[name] = node;
      }
    }
  }

  NodePtr Find(const std::string& name) {
    const absl::MutexLock lock(&mu_);
    const auto found = names_.find(Normal(name));
    return found == names_.end() ? nullptr : found->second;
  }
  template <typename File, typename Result>
  IOStatus OpenToRead(const std::string& name, std::unique_ptr<Result>* result) {
    if (const int error = error_(/*change=*/false); error != 0) return FromErrno(name, error);
    NodePtr node = Find(name);
    if (node == nullptr) return FromErrno(name, ENOENT);
    *result = std::make_unique<File>(shared_from_this(), std::move(node));
    return IOStatus::OK();
  }
  IOStatus Change(const std::string& name, int error_if_missing, NameChanges changes);
  IOStatus Read(const Node& node, uint64_t offset, size_t n, Slice* result, char* scratch);
  IOStatus Append(Node& node, const Slice& data);
  IOStatus Sync(Node& node);
  IOStatus SyncFolder(const std::string& folder);
  void CutUnsynced(Node& node) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const ErrorFn error_;
  absl::Mutex mu_;
  std::mt19937_64 random_ ABSL_GUARDED_BY(mu_);
  Names names_ ABSL_GUARDED_BY(mu_);          // what is seen
  Names durable_names_ ABSL_GUARDED_BY(mu_);  // what is left without power
  std::map<std::string, std::vector<NameChanges>> unsynced_ ABSL_GUARDED_BY(mu_);  // by folder
  std::set<std::string> locked_ ABSL_GUARDED_BY(mu_);
};

class SimulatedFiles::Files::Sequential final : public rocksdb::FSSequentialFile {
 public:
  Sequential(std::shared_ptr<Files> files, NodePtr node)
      : files_(std::move(files)), node_(std::move(node)) {}
  IOStatus Read(size_t n, const IOOptions&, Slice* result, char* scratch,
                IODebugContext*) override {
    IOStatus status = files_->Read(*node_, at_, n, result, scratch);
    if (status.ok()) at_ += result->size();
    return status;
  }
  IOStatus Skip(uint64_t n) override {
    at_ += n;
    return IOStatus::OK();
  }

 private:
  const std::shared_ptr<Files> files_;
  const NodePtr node_;
  uint64_t at_ = 0;
};

class SimulatedFiles::Files::RandomAccess final : public rocksdb::FSRandomAccessFile {
 public:
  RandomAccess(std::shared_ptr<Files> files, NodePtr node)
      : files_(std::move(files)), node_(std::move(node)) {}
  IOStatus Read(uint64_t offset, size_t n, const IOOptions&, Slice* result, char* scratch,
                IODebugContext*) const override {
    return files_->Read(*node_, offset, n, result, scratch);
  }

 private:
  const std::shared_ptr<Files> files_;
  const NodePtr node_;
};

class SimulatedFiles::Files::Writable final : public rocksdb::FSWritableFile {
 public:
  Writable(std::shared_ptr<Files> files, NodePtr node)
      : files_(std::move(files)), node_(std::move(node)) {}
  using FSWritableFile::Append;
  IOStatus Append(const Slice& data, const IOOptions&, IODebugContext*) override {
    return files_->Append(*node_, data);
  }
  IOStatus Sync(const IOOptions&, IODebugContext*) override { return files_->Sync(*node_); }
  IOStatus Flush(const IOOptions&, IODebugContext*) override { return IOStatus::OK(); }
  IOStatus Close(const IOOptions&, IODebugContext*) override { return IOStatus::OK(); }
  bool IsSyncThreadSafe() const override { return true; }
  uint64_t GetFileSize(const IOOptions&, IODebugContext*) override {
    const absl::MutexLock lock(&files_->mu_);
    return node_->bytes.size();
  }

 private:
  const std::shared_ptr<Files> files_;
  const NodePtr node_;
};

class SimulatedFiles::Files::Folder final : public rocksdb::FSDirectory {
 public:
  Folder(std::shared_ptr<Files> files, std::string name)
      : files_(std::move(files)), name_(std::move(name)) {}
  IOStatus Fsync(const IOOptions&, IODebugContext*) override { return files_->SyncFolder(name_); }
  IOStatus Close(const IOOptions&, IODebugContext*) override { return IOStatus::OK(); }

 private:
  const std::shared_ptr<Files> files_;
  const std::string name_;
};

IOStatus SimulatedFiles::Files::NewWritableFile(const std::string& name,
                                                const rocksdb::FileOptions&,
                                                std::unique_ptr<rocksdb::FSWritableFile>* result,
                                                IODebugContext*) {
  NodePtr node = NewNode(/*folder=*/false);
  IOStatus status = Change(name, 0, {{Normal(name), node}});
  if (status.ok()) *result = std::make_unique<Writable>(shared_from_this(), std::move(node));
  return status;
}

IOStatus SimulatedFiles::Files::NewDirectory(const std::string& name, const IOOptions&,
                                             std::unique_ptr<rocksdb::FSDirectory>* result,
                                             IODebugContext*) {
  if (const int error = error_(/*change=*/false); error != 0) return FromErrno(name, error);
  if (Find(name) == nullptr) return FromErrno(name, ENOENT);
  *result = std::make_unique<Folder>(shared_from_this(), Normal(name));
  return IOStatus::OK();
}

IOStatus SimulatedFiles::Files::GetChildren(const std::string& folder, const IOOptions&,
                                            std::vector<std::string>* result, IODebugContext*) {
  if (const int error = error_(/*change=*/false); error != 0) return FromErrno(folder, error);
  result->clear();
  const absl::MutexLock lock(&mu_);
  const std::string parent = Normal(folder);
  if (names_.count(parent) == 0) return IOStatus::NotFound(folder);
  for (const auto& [name, node] : names_) {
    if (!name.empty() && Parent(name) == parent) result->push_back(name.substr(parent.size() + 1));
  }
  return IOStatus::OK();
}

IOStatus SimulatedFiles::Files::GetFileSize(const std::string& name, const IOOptions&,
                                            uint64_t* bytes, IODebugContext*) {
  const NodePtr node = Find(name);
  if (node == nullptr) return FromErrno(name, ENOENT);
  const absl::MutexLock lock(&mu_);
  *bytes = node->bytes.size();
  return IOStatus::OK();
}

IOStatus SimulatedFiles::Files::LockFile(const std::string& name, const IOOptions&,
                                         rocksdb::FileLock** lock, IODebugContext*) {
  if (Find(name) == nullptr) {
    IOStatus status = Change(name, 0, {{Normal(name), NewNode(/*folder=*/false)}});
    if (!status.ok()) return status;
  }
  const absl::MutexLock hold(&mu_);
  if (!locked_.insert(name).second) return IOStatus::IOError(name, "locked");
  *lock = new Lock(name);  // RocksDB's interface; UnlockFile deletes it
  return IOStatus::OK();
}

IOStatus SimulatedFiles::Files::UnlockFile(rocksdb::FileLock* lock, const IOOptions&,
                                           IODebugContext*) {
  const std::unique_ptr<Lock> owned(static_cast<Lock*>(lock));
  const absl::MutexLock hold(&mu_);
  locked_.erase(owned->name);
  return IOStatus::OK();
}

// Of names in one folder, all at once. `error_if_missing`: unless there is such a `name`.
IOStatus SimulatedFiles::Files::Change(const std::string& name, int error_if_missing,
                                       NameChanges changes) {
  if (const int error = error_(/*change=*/true); error != 0) return FromErrno(name, error);
  const absl::MutexLock lock(&mu_);
  if (error_if_missing != 0 && names_.count(Normal(name)) == 0) {
    return FromErrno(name, error_if_missing);
  }
  const std::string folder = Parent(Normal(name));
  if (names_.count(folder) == 0) return FromErrno(name, ENOENT);
  Apply(changes, names_);
  unsynced_[folder].push_back(std::move(changes));
  return IOStatus::OK();
}

IOStatus SimulatedFiles::Files::Read(const Node& node, uint64_t offset, size_t n, Slice* result,
                                     char* scratch) {
  if (const int error = error_(/*change=*/false); error != 0) return FromErrno("read", error);
  const absl::MutexLock lock(&mu_);
  const size_t from = std::min<size_t>(offset, node.bytes.size());
  const size_t bytes = std::min(n, node.bytes.size() - from);
  std::memcpy(scratch, node.bytes.data() + from, bytes);
  *result = Slice(scratch, bytes);
  return IOStatus::OK();
}

IOStatus SimulatedFiles::Files::Append(Node& node, const Slice& data) {
  const int error = error_(/*change=*/true);
  const absl::MutexLock lock(&mu_);
  // One that fails has done some of its work.
  node.bytes.append(data.data(), error == 0 ? data.size() : random_() % (data.size() + 1));
  return FromErrno("append", error);
}

IOStatus SimulatedFiles::Files::Sync(Node& node) {
  const int error = error_(/*change=*/true);
  const absl::MutexLock lock(&mu_);
  if (error == 0) {
    node.synced = node.bytes.size();
  } else if (random_() % 2 == 0) {
    node.lost.emplace_back(node.synced, node.bytes.size());
  }
  return FromErrno("sync", error);
}

IOStatus SimulatedFiles::Files::SyncFolder(const std::string& folder) {
  if (const int error = error_(/*change=*/true); error != 0) return FromErrno(folder, error);
  const absl::MutexLock lock(&mu_);
  for (const NameChanges& changes : unsynced_[folder]) Apply(changes, durable_names_);
  unsynced_.erase(folder);
  return IOStatus::OK();
}

void SimulatedFiles::Files::CutUnsynced(Node& node) {
  const size_t unsynced = node.bytes.size() - node.synced;
  const uint64_t odds = random_() % 4;  // all of it, none, any, any with a garbled end
  if (odds == 1) node.bytes.resize(node.synced);
  if (odds >= 2) node.bytes.resize(node.synced + random_() % (unsynced + 1));
  if (odds == 3) {
    const size_t end = node.bytes.size();
    for (size_t at = std::max(node.synced, end - std::min(end, kSector)); at < end; ++at) {
      node.bytes[at] = static_cast<char>(random_());
    }
  }
  for (const auto& [from, to] : node.lost) {
    for (size_t at = from; at < std::min(to, node.bytes.size()); ++at) node.bytes[at] = 0;
  }
  node.lost.clear();
  node.synced = node.bytes.size();
}

void SimulatedFiles::Files::PowerCut() {
  const absl::MutexLock lock(&mu_);
  for (const auto& [folder, operations] : unsynced_) {
    const size_t happened = random_() % (operations.size() + 1);
    for (size_t i = 0; i < happened; ++i) Apply(operations[i], durable_names_);
  }
  unsynced_.clear();
  // In order of names a folder comes before what is in it.
  for (auto it = durable_names_.begin(); it != durable_names_.end();) {
    const bool reached = it->first.empty() || durable_names_.count(Parent(it->first)) > 0;
    it = reached ? std::next(it) : durable_names_.erase(it);
  }
  for (const auto& [name, node] : durable_names_) CutUnsynced(*node);
  names_ = durable_names_;
  locked_.clear();
}

SimulatedFiles::SimulatedFiles(uint64_t seed, ErrorFn error)
    : files_(std::make_shared<Files>(seed, std::move(error))),
      env_(rocksdb::NewCompositeEnv(files_)) {}
SimulatedFiles::~SimulatedFiles() = default;

rocksdb::Env* SimulatedFiles::env() { return env_.get(); }
void SimulatedFiles::PowerCut() { files_->PowerCut(); }

}  // namespace larder::testing
