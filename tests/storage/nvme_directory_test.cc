// The directory of a tier: whose it is, which version wrote it, how its slots are laid out.

#include "storage/nvme_directory.h"

#include <sys/stat.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "storage/nvme_format.h"
#include "tests/storage/nvme_testing.h"

namespace larder {
namespace {

using ::larder::testing::TempDir;

constexpr uint64_t kMiB = 1 << 20;

std::string ReadFile(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

// Every file below `folder` and what it holds.
std::map<std::string, std::string> Snapshot(const std::string& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    files[entry.path()] = entry.is_regular_file() ? ReadFile(entry.path()) : "";
  }
  return files;
}

absl::StatusOr<std::unique_ptr<NvmeDirectory>> Open(const std::string& path, uint64_t bytes = kMiB,
                                                    uint64_t slab_bytes = 0) {
  return NvmeDirectory::Open({path, bytes, slab_bytes, /*direct_io=*/false});
}

void ExpectRefusedUntouched(const std::string& path, const std::string& why) {
  const auto before = Snapshot(path);
  for (const auto& opened : {Open(path).status(), NvmeDirectory::OpenExisting(path).status()}) {
    EXPECT_TRUE(absl::IsFailedPrecondition(opened)) << opened;
    EXPECT_TRUE(absl::StrContains(opened.message(), path)) << opened;
    EXPECT_TRUE(absl::StrContains(opened.message(), why)) << opened;
  }
  EXPECT_EQ(Snapshot(path), before);
}

TEST(NvmeDirectory, FolderWithAnythingElseIsRefusedUntouched) {
  for (const char* name : {"slots", "index", "thesis.tex", ".bashrc"}) {
    TempDir folder;
    std::ofstream(absl::StrCat(folder.path(), "/", name)) << "precious";
    ExpectRefusedUntouched(folder.path(), "choose an empty one");
  }
}

TEST(NvmeDirectory, FreshlyMadeFileSystemIsEmpty) {
  TempDir folder;
  std::filesystem::create_directory(folder.path() + "/lost+found");
  EXPECT_TRUE(Open(folder.path()).ok());
}

TEST(NvmeDirectory, OtherVersionsOtherMachinesAndDamageAreRefusedUntouched) {
  std::string flipped = kNvmeFormatText;
  flipped[20] ^= 1;
  for (const std::string& text :
       {std::string("larder nvme format 1\n"), std::string("larder nvme format 3 little-endian\n"),
        std::string("larder nvme format 2 big-endian\n"), flipped, std::string(),
        std::string(kNvmeFormatText) + "slab 4097\n", std::string(kNvmeFormatText) + "slab 8192",
        std::string(kNvmeFormatText) + "slabs 8192\n", std::string(300, '\xff')}) {
    TempDir folder;
    ASSERT_TRUE(Open(folder.path()).ok());
    std::ofstream(folder.path() + "/FORMAT") << text;
    ExpectRefusedUntouched(folder.path(), "start the version that wrote it, or empty the directory");
  }
}

TEST(NvmeDirectory, AFormatThatNeverEndsIsRefusedInFewWords) {
  enum { kZeros, kSlabOfZeros, kFifo, kCount };
  for (int kind = 0; kind < kCount; ++kind) {
    SCOPED_TRACE(kind);
    TempDir folder;
    const std::string path = folder.path() + "/FORMAT";
    if (kind == kZeros) {
      std::filesystem::create_symlink("/dev/zero", path);
    } else if (kind == kFifo) {
      ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    } else {
      std::ofstream(path) << kNvmeFormatText << "slab ";
      std::filesystem::resize_file(path, uint64_t{1} << 40);  // a hole
    }
    for (const auto& opened :
         {Open(folder.path()).status(), NvmeDirectory::OpenExisting(folder.path()).status()}) {
      EXPECT_TRUE(absl::IsFailedPrecondition(opened)) << opened;
      EXPECT_LE(opened.message().size(), 1000u) << opened;
    }
    EXPECT_FALSE(std::filesystem::exists(folder.path() + "/LOCK"));
  }
}

// Whoever looks while it is being made finds none yet, or one that is in use.
TEST(NvmeDirectory, HalfMadeItIsNotTakenForSomebodyElses) {
  for (int round = 0; round < 50; ++round) {
    TempDir folder(larder::testing::MemoryFolder());
    std::atomic<int> looks = 0;
    std::atomic<bool> made = false;
    std::jthread looker([&] {
      do {
        const auto status = NvmeDirectory::OpenExisting(folder.path()).status();
        EXPECT_TRUE(absl::StrContains(status.message(), "holds no NVMe tier") ||
                    absl::StrContains(status.message(), "is in use by process"))
            << status;
        ++looks;
      } while (!made);
    });
    while (looks == 0) std::this_thread::yield();
    const auto opened = Open(folder.path());
    EXPECT_TRUE(opened.ok()) << opened.status();
    made = true;
    looker.join();
  }
}

TEST(NvmeDirectory, OfManyThatStartAtOnceOneGetsIt) {
  for (int round = 0; round < 10; ++round) {
    TempDir folder(larder::testing::MemoryFolder());
    std::vector<absl::StatusOr<std::unique_ptr<NvmeDirectory>>> opened(4);
    {
      std::vector<std::jthread> threads;
      for (auto& each : opened) threads.emplace_back([&] { each = Open(folder.path()); });
    }
    size_t have = 0;
    for (const auto& each : opened) {
      have += each.ok();
      EXPECT_TRUE(each.ok() || absl::StrContains(each.status().message(), "is in use by process"))
          << each.status();
    }
    EXPECT_EQ(have, 1u);
  }
}

TEST(NvmeDirectory, ExistingCreatesNothing) {
  TempDir folder;
  for (const std::string& path : {folder.path(), folder.path() + "/nowhere"}) {
    const auto status = NvmeDirectory::OpenExisting(path).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "holds no NVMe tier")) << status;
  }
  EXPECT_TRUE(Snapshot(folder.path()).empty());
  ASSERT_TRUE(Open(folder.path(), 3 * kMiB).ok());
  const auto existing = NvmeDirectory::OpenExisting(folder.path());
  ASSERT_TRUE(existing.ok()) << existing.status();
  EXPECT_EQ((*existing)->slots_bytes(), 3 * kMiB);
  EXPECT_TRUE(absl::IsFailedPrecondition(Open(folder.path()).status())) << "it holds the lock";
}

// A block of 192 KiB at a place that another slab size would misalign must stay findable.
TEST(NvmeDirectory, LayoutOutlivesGrowingAndShrinking) {
  TempDir folder;
  const auto slab_after = [&](uint64_t bytes, uint64_t wanted) {
    const auto directory = Open(folder.path(), bytes, wanted);
    EXPECT_TRUE(directory.ok()) << directory.status();
    return (*directory)->slab_bytes();
  };
  EXPECT_EQ(slab_after(8 * kMiB, kMiB), kMiB);
  EXPECT_EQ(slab_after(8 * kMiB, kMiB), kMiB);
  EXPECT_EQ(slab_after(32 * kMiB, 4 * kMiB), kMiB) << "grown";
  EXPECT_EQ(slab_after(4 * kMiB, 2 * kMiB), kMiB) << "shrunk to four slabs";
  EXPECT_EQ(slab_after(4 * kMiB - 4096, 1 * kMiB), kMiB) << "what it has is what is wanted";
  EXPECT_EQ(slab_after(2 * kMiB, 512 << 10), 512u << 10) << "too few slabs: laid out anew";
  EXPECT_EQ(slab_after(8 * kMiB, kMiB), 512u << 10);
  EXPECT_EQ(slab_after(8 * kMiB, 0), 512u << 10) << "whoever does not care changes nothing";
}

}  // namespace
}  // namespace larder
