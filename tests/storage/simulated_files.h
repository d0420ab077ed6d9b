// SimulatedFiles: a file system in memory, for RocksDB, that loses what was not synced.
//
//   file     [ synced | not synced ]     without power: the rest goes, stays, is cut anywhere, or
//                                        is cut and ends in a sector of garbage
//   folder   create, rename, delete ...  since its last fsync: without power a random number of
//                                        the first ones has happened, as in a journal
//
// A sync that fails may have dropped what it was to write, for ever, although later ones succeed:
// that is zeros after the power has gone.
//
// It outlives the databases on it, one after the other. The root folder is there; all others are
// files of their parent and go with it.
//
// Thread safety: thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace rocksdb {
class Env;
}

namespace larder::testing {

class SimulatedFiles {
 public:
  // Asked at each operation: 0, or the errno it fails with. `change`: it is one that a power cut
  // could undo; else it only looks.
  using ErrorFn = std::function<int(bool change)>;

  SimulatedFiles(uint64_t seed, ErrorFn error);
  ~SimulatedFiles();

  rocksdb::Env* env();

  // To be called while no database is open: decides what has survived.
  void PowerCut();

 private:
  class Files;
  std::shared_ptr<Files> files_;
  std::unique_ptr<rocksdb::Env> env_;
};

}  // namespace larder::testing
