// A running larderd, seen from a worker (tests/bench/README.md has the workload).
#include <sys/mman.h>

#include <cstring>
#include <span>

#include "absl/strings/str_format.h"
#include "bare_stream.h"
#include "bench.h"
#include "daemon_fixture.h"
#include "idle_daemon.h"
#include "storage/check.h"

namespace larder::bench {
namespace {

// --- lookup_8k_added_us ------------------------------------------------------------------

constexpr int kLookupRuns = 7;
constexpr int kLookupsARun = 400;

struct RoundTrips {
  std::vector<double> lookup_us;
  std::vector<double> echo_us;
};

// Makes `message` as long on the wire as `bytes`, by its payload.
template <typename Message>
void PadTo(Message& message, size_t bytes) {
  message.set_payload(std::string(bytes, 'x'));
  message.mutable_payload()->resize(2 * bytes - message.ByteSizeLong());
  LARDER_CHECK(message.ByteSizeLong() == bytes);
}

absl::Status LookUpAndEcho(DaemonFixture& daemon, RoundTrips& times) {
  v1::LookupPrefixRequest lookup;
  lookup.set_session_id(daemon.session().id());
  lookup.set_model_id(daemon.model().model_id());
  lookup.mutable_tokens()->Add(daemon.prompt().begin(), daemon.prompt().end());
  v1::ReleaseRequest release;
  release.set_session_id(daemon.session().id());
  v1::EchoRequest echo;
  v1::EchoRequest short_echo;
  for (int i = 0; i < kLookupsARun; ++i) {
    // 1. The lookup and, untimed, its release.
    v1::LookupPrefixResponse found;
    grpc::Status status;
    times.lookup_us.push_back(1e6 * Timed([&] {
                                grpc::ClientContext context;
                                status = daemon.kv().LookupPrefix(&context, lookup, &found);
                              }));
    if (!status.ok()) return ToStatus(status, "LookupPrefix");
    LARDER_CHECK(found.matched_tokens() == daemon.prompt().size());
    release.set_lease_id(found.lease_id());
    v1::ReleaseResponse released;
    grpc::ClientContext release_context;
    status = daemon.kv().Release(&release_context, release, &released);
    if (!status.ok()) return ToStatus(status, "Release");
    // 2. An echo of the same sizes and, untimed, a short one in the release's place.
    if (i == 0) {
      v1::EchoResponse sized;
      PadTo(sized, found.ByteSizeLong());
      echo.set_response_bytes(static_cast<uint32_t>(sized.payload().size()));
      PadTo(echo, lookup.ByteSizeLong());
    }
    v1::EchoResponse answer;
    times.echo_us.push_back(1e6 * Timed([&] {
                              grpc::ClientContext context;
                              status = daemon.inspector().Echo(&context, echo, &answer);
                            }));
    if (!status.ok()) return ToStatus(status, "Echo");
    LARDER_CHECK(answer.ByteSizeLong() == found.ByteSizeLong());
    grpc::ClientContext short_context;
    status = daemon.inspector().Echo(&short_context, short_echo, &answer);
    if (!status.ok()) return ToStatus(status, "Echo");
  }
  return absl::OkStatus();
}

absl::Status MeasureLookup(DaemonFixture& daemon) {
  RoundTrips warm_up;
  if (absl::Status status = LookUpAndEcho(daemon, warm_up); !status.ok()) return status;
  std::vector<double> lookups;
  std::vector<double> echoes;
  std::vector<double> added;
  for (int run = 0; run < kLookupRuns; ++run) {
    RoundTrips times;
    if (absl::Status status = LookUpAndEcho(daemon, times); !status.ok()) return status;
    lookups.push_back(Median(std::move(times.lookup_us)));
    echoes.push_back(Median(std::move(times.echo_us)));
    added.push_back(lookups.back() - echoes.back());
  }
  const double echo = Median(echoes);
  Print({"lookup_8k_added_us",
         Median(added),
         "us",
         absl::StrFormat("Echo of the same sizes: %.0f us; LookupPrefix: %.0f us", echo,
                         Median(lookups)),
         Median(lookups) / echo,
         {Goal::kAtMost, 60, ""}},
        added);
  return absl::OkStatus();
}

// --- host_hit_over_memcpy ----------------------------------------------------------------

constexpr int kHitRounds = 21;

// Private memory that has been touched.
class PrivateMemory {
 public:
  explicit PrivateMemory(bool huge_pages) {
    base_ = static_cast<std::byte*>(
        ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    LARDER_CHECK(base_ != MAP_FAILED);
    ::madvise(base_, kBytes, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::memset(base_, 1, kBytes);
  }
  ~PrivateMemory() { ::munmap(base_, kBytes); }
  PrivateMemory(const PrivateMemory&) = delete;
  PrivateMemory& operator=(const PrivateMemory&) = delete;
  std::byte* block(uint64_t i) const { return base_ + i * kBlockBytes; }

 private:
  static constexpr uint64_t kBytes = kBlocks * kBlockBytes;
  std::byte* base_;
};

absl::Status CopyHit(const DaemonFixture& daemon, const PrivateMemory& to) {
  absl::StatusOr<Lease> lease = daemon.session().Lookup(daemon.model(), daemon.prompt());
  if (!lease.ok()) return lease.status();
  LARDER_CHECK(lease->end() == kBlocks);
  for (uint32_t i = 0; i < kBlocks; ++i) {
    const auto block = lease->Block(i);
    if (!block.ok()) return block.status();
    std::memcpy(to.block(i), block->data(), block->size());
  }
  return lease->Release();
}

absl::Status MeasureHostHit(const DaemonFixture& daemon) {
  const PrivateMemory ordinary(/*huge_pages=*/false);
  const PrivateMemory huge(/*huge_pages=*/true);
  const PrivateMemory to(/*huge_pages=*/false);
  const auto copy = [&](const PrivateMemory& from) {
    return Timed([&] {
      for (uint32_t i = 0; i < kBlocks; ++i) std::memcpy(to.block(i), from.block(i), kBlockBytes);
    });
  };
  absl::Status status = CopyHit(daemon, to);  // maps the arena's pages
  std::vector<double> hits;
  std::vector<double> copies[2];
  std::vector<double> ratios[2];
  for (int round = 0; round < kHitRounds && status.ok(); ++round) {
    copies[0].push_back(copy(ordinary));
    hits.push_back(Timed([&] { status = CopyHit(daemon, to); }));
    copies[1].push_back(copy(huge));
    for (int i = 0; i < 2; ++i) ratios[i].push_back(copies[i].back() / hits.back());
  }
  if (!status.ok()) return status;
  const double gigabytes = static_cast<double>(kBlocks * kBlockBytes) / 1e9;
  for (int i = 0; i < 2; ++i) {
    Goal goal;
    if (i == 0) goal = {Goal::kAtLeast, 0.9, ""};
    Print({i == 0 ? "host_hit_over_memcpy" : "host_hit_over_memcpy_huge", Median(ratios[i]), "x",
           absl::StrFormat("memcpy%s: %.2f GB/s; hit: %.2f GB/s", i == 0 ? "" : " from huge pages",
                           gigabytes / Median(copies[i]), gigabytes / Median(hits)),
           Median(ratios[i]), goal},
          ratios[i]);
  }
  return absl::OkStatus();
}

// --- download_over_stream ----------------------------------------------------------------

constexpr int kDownloadPairs = 11;

absl::Status ReadAll(v1::KvCache::Stub& stub, const v1::DownloadRequest& request) {
  grpc::ClientContext context;
  const auto reader = stub.Download(&context, request);
  uint64_t bytes = 0;
  v1::DownloadChunk chunk;
  while (reader->Read(&chunk)) bytes += chunk.data().size();
  if (grpc::Status status = reader->Finish(); !status.ok()) return ToStatus(status, "Download");
  LARDER_CHECK(bytes == kBlocks * kBlockBytes);
  return absl::OkStatus();
}

absl::Status MeasureDownload(DaemonFixture& daemon, const std::string& program) {
  const std::string address = "unix:" + daemon.folder() + "/bare.sock";
  const absl::StatusOr<std::unique_ptr<Child>> server =
      Child::Start({program, "--bare-stream=" + address});
  if (!server.ok()) return server.status();
  const auto bare = v1::KvCache::NewStub(NewChannel(address));
  absl::StatusOr<Lease> lease = daemon.session().Lookup(daemon.model(), daemon.prompt());
  if (!lease.ok()) return lease.status();
  v1::DownloadRequest request;
  request.mutable_blocks()->set_session_id(daemon.session().id());
  request.mutable_blocks()->set_lease_id(lease->id());
  absl::Status status = ReadAll(*bare, request);
  status.Update(ReadAll(daemon.kv(), request));
  std::vector<double> bare_times;
  std::vector<double> times;
  std::vector<double> ratios;
  for (int pair = 0; pair < kDownloadPairs && status.ok(); ++pair) {
    bare_times.push_back(Timed([&] { status.Update(ReadAll(*bare, request)); }));
    times.push_back(Timed([&] { status.Update(ReadAll(daemon.kv(), request)); }));
    ratios.push_back(bare_times.back() / times.back());
  }
  if (!status.ok()) return status;
  const double gigabytes = static_cast<double>(kBlocks * kBlockBytes) / 1e9;
  Print({"download_over_stream",
         Median(ratios),
         "x",
         absl::StrFormat("bare gRPC stream: %.3f GB/s; Download: %.3f GB/s",
                         gigabytes / Median(bare_times), gigabytes / Median(times)),
         Median(ratios),
         {Goal::kAtLeast, 0.8, ""}},
        ratios);
  return absl::OkStatus();
}

absl::Status WithDaemon(const DaemonPlace& place,
                        const std::function<absl::Status(DaemonFixture&)>& f) {
  const absl::StatusOr<std::unique_ptr<DaemonFixture>> daemon = DaemonFixture::Start(place);
  return daemon.ok() ? f(**daemon) : daemon.status();
}

}  // namespace
}  // namespace larder::bench

int main(int argc, char** argv) {
  using namespace larder::bench;
  std::vector<std::string> names(argv + 1, argv + argc);
  const std::string bare_address = TakeFlag(names, "bare-stream", "");
  if (!bare_address.empty()) return ServeBareStream(bare_address);
  const DaemonPlace place = {TakeFlag(names, "larderd", "larderd"),
                             TakeFlag(names, "directory", ".")};
  const std::string program = argv[0];
  return RunBenchmarks(
      names, {{{"lookup_8k_added_us"}, [&] { return WithDaemon(place, MeasureLookup); }},
              {{"host_hit_over_memcpy", "host_hit_over_memcpy_huge"},
               [&] { return WithDaemon(place, MeasureHostHit); }},
              {{"download_over_stream"},
               [&] {
                 return WithDaemon(place, [&](DaemonFixture& daemon) {
                   return MeasureDownload(daemon, program);
                 });
               }},
              {{"idle_cpu_percent", "rss_overhead_mib"}, [&] { return MeasureIdle(place); }}});
}
