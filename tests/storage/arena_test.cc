// Arenas: size, content, seals, and what other processes may do with them.

#include "storage/arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <sstream>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace larder {
namespace {

constexpr uint64_t kBytes = 8 << 20;

std::unique_ptr<Arena> Create(uint64_t bytes, bool huge_pages = true) {
  auto arena = Arena::Create({"test", bytes, huge_pages, 0});
  EXPECT_TRUE(arena.ok()) << arena.status();
  LARDER_CHECK(arena.ok());
  return *std::move(arena);
}

// What /proc/self/smaps has after `key` for the mapping that starts at `base`.
std::string Smaps(const void* base, const std::string& key) {
  std::ostringstream start;
  start << std::hex << reinterpret_cast<uintptr_t>(base) << "-";
  std::ifstream smaps("/proc/self/smaps");
  std::string line;
  bool ours = false;
  while (std::getline(smaps, line)) {
    if (absl::StartsWith(line, start.str())) ours = true;
    if (ours && absl::StartsWith(line, key)) return line.substr(key.size()) + " ";
  }
  return "";
}

std::string VmFlags(const void* base) { return Smaps(base, "VmFlags:"); }

// KiB of the mapping that lie in huge pages.
uint64_t HugeKib(const void* base) { return std::stoull(Smaps(base, "ShmemPmdMapped:")); }

TEST(Arena, IsZeroedPresentAndWritable) {
  for (bool huge_pages : {true, false}) {
    auto arena = Create(kBytes, huge_pages);
    EXPECT_EQ(arena->bytes(), kBytes);
    EXPECT_TRUE(std::all_of(arena->base(), arena->base() + kBytes,
                            [](std::byte b) { return b == std::byte{0}; }));
    std::fill_n(arena->base(), kBytes, std::byte{7});
    EXPECT_EQ(arena->At(Slot(1)), arena->base());
    EXPECT_EQ(arena->At(Slot(3)), arena->base() + 2 * kSlotGranule);
  }
}

// Whether this kernel makes huge pages on demand, and has one left.
bool KernelCollapses() {
  auto small = Create(kBytes, /*huge_pages=*/false);
  ::madvise(small->base(), kBytes, MADV_HUGEPAGE);
  return ::madvise(small->base(), kBytes, 25 /*MADV_COLLAPSE*/) == 0;
}

TEST(Arena, LiesInHugePages) {
  auto arena = Create(kBytes);
  auto mapped = Arena::Map(::dup(arena->fd()), kBytes);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  for (const std::byte* base : {arena->base(), (*mapped)->base()}) {
    EXPECT_EQ(reinterpret_cast<uintptr_t>(base) % (2 << 20), 0) << "no huge page begins here";
  }
  EXPECT_EQ(HugeKib(Create(kBytes, /*huge_pages=*/false)->base()), 0);
  if (arena->huge_pages() || !KernelCollapses()) return;  // hugetlb, or no huge pages on demand
  EXPECT_EQ(HugeKib(arena->base()), kBytes >> 10);
  std::fill_n((*mapped)->base(), kBytes, std::byte{7});
  EXPECT_EQ(HugeKib((*mapped)->base()), kBytes >> 10);
}

TEST(Arena, PrefaultsManyChunksInThreads) {
  auto arena = Arena::Create({"test", 200 << 20, false, 4});
  ASSERT_TRUE(arena.ok()) << arena.status();
  // Every page is there before anybody touches one.
  std::vector<unsigned char> present((200 << 20) / 4096);
  ASSERT_EQ(::mincore((*arena)->base(), 200 << 20, present.data()), 0);
  EXPECT_TRUE(std::all_of(present.begin(), present.end(), [](auto p) { return p & 1; }));
}

TEST(Arena, RefusesSizesThatAreNoMultipleOfAPage) {
  for (uint64_t bytes : {uint64_t{0}, uint64_t{1}, uint64_t{4097}}) {
    auto arena = Arena::Create({"test", bytes, true, 0});
    EXPECT_TRUE(absl::IsInvalidArgument(arena.status())) << arena.status();
  }
}

TEST(Arena, RefusesMoreThanTheMachineHas) {
  auto arena = Arena::Create({"big", uint64_t{1} << 46, true, 0});
  ASSERT_TRUE(absl::IsResourceExhausted(arena.status())) << arena.status();
  EXPECT_TRUE(absl::StrContains(arena.status().message(), "big"));
  EXPECT_TRUE(absl::StrContains(arena.status().message(), "70368744177664"));
}

TEST(Arena, SizeIsSealed) {
  auto arena = Create(kBytes);
  EXPECT_NE(::ftruncate(arena->fd(), 4096), 0);
  EXPECT_NE(::ftruncate(arena->fd(), 2 * kBytes), 0);
  EXPECT_NE(::fcntl(arena->fd(), F_ADD_SEALS, F_SEAL_WRITE), 0);
}

TEST(Arena, StaysOutOfChildrenAndCoreDumps) {
  auto arena = Create(kBytes);
  const std::string flags = VmFlags(arena->base());
  EXPECT_TRUE(absl::StrContains(flags, " dc ")) << flags;  // not copied on fork
  EXPECT_TRUE(absl::StrContains(flags, " dd ")) << flags;  // not dumped
  EXPECT_TRUE(::fcntl(arena->fd(), F_GETFD) & FD_CLOEXEC);
}

TEST(Arena, MapsTheSameBytes) {
  auto arena = Create(kBytes);
  auto mapped = Arena::Map(::dup(arena->fd()), kBytes);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  EXPECT_NE((*mapped)->base(), arena->base());
  (*mapped)->base()[12345] = std::byte{42};
  EXPECT_EQ(arena->base()[12345], std::byte{42});
  EXPECT_TRUE(absl::StrContains(VmFlags((*mapped)->base()), " dc "));
  EXPECT_TRUE(::fcntl((*mapped)->fd(), F_GETFD) & FD_CLOEXEC);
}

TEST(Arena, MapChecksTheFile) {
  auto arena = Create(kBytes);
  auto too_large = Arena::Map(::dup(arena->fd()), kBytes + 4096);
  EXPECT_TRUE(absl::IsInvalidArgument(too_large.status())) << too_large.status();
  auto nothing = Arena::Map(::dup(arena->fd()), 0);
  EXPECT_TRUE(absl::IsInvalidArgument(nothing.status())) << nothing.status();
  const int unsealed = ::memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(::ftruncate(unsealed, kBytes), 0);
  auto shrinkable = Arena::Map(unsealed, kBytes);
  EXPECT_TRUE(absl::IsInvalidArgument(shrinkable.status())) << shrinkable.status();
  EXPECT_NE(::fcntl(unsealed, F_GETFD), 0) << "Map takes the descriptor over, also on failure";
  EXPECT_FALSE(Arena::Map(-1, kBytes).ok());
}

}  // namespace
}  // namespace larder
