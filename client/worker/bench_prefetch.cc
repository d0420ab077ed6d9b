// Experiment "prefetch": the blocks of a prefix are on NVMe, and a prefetch to HOST is issued some
// time before the request arrives. How much of the time of loading them is gone from the TTFT?
//
//   gone = (TTFT without prefetch - TTFT) / (TTFT without prefetch - TTFT when all is in HOST)
#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/client.h"
#include "client/worker/bench.h"
#include "client/worker/bench_published.h"

namespace larder::worker::bench {
namespace {

constexpr int kRounds = 7;
// Head starts, in times of what loading takes.
constexpr double kLeads[] = {0, 0.25, 0.5, 0.75, 1, 1.5, 2};

class PrefetchRun {
 public:
  PrefetchRun(Published& published, Engine& engine, Client client, uint64_t model_id)
      : published_(published), engine_(engine), client_(std::move(client)), model_id_(model_id) {}

  // TTFT from whatever is there.
  absl::StatusOr<absl::Duration> Request() {
    absl::StatusOr<Result> result =
        Generate(engine_, published_.PromptOf(static_cast<uint32_t>(published_.prefix().size())),
                 kAnswerTokens);
    if (!result.ok()) return result.status();
    if (answer_.empty()) answer_ = result->completions[0].tokens;
    absl::Status same = CheckSame(result->completions[0].tokens, answer_, "prefetch");
    if (!same.ok()) return same;
    return result->stats.ttft;
  }

  absl::Status Empty() { return published_.daemon().Evict(v1::TIER_HOST); }

  // TTFT of a request that comes `lead` after its prefetch.
  absl::StatusOr<absl::Duration> RequestAfterPrefetch(absl::Duration lead) {
    if (absl::Status emptied = Empty(); !emptied.ok()) return emptied;
    absl::Status prefetched;
    std::thread prefetch([&] {
      PrefetchOptions options;
      options.tier = v1::TIER_HOST;
      prefetched = client_.Prefetch(model_id_, published_.prefix(), options).status();
    });
    // The head start is what is varied, so it is time that is waited for.
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(lead));
    absl::StatusOr<absl::Duration> ttft = Request();
    prefetch.join();
    if (!prefetched.ok()) return prefetched;
    return ttft;
  }

 private:
  Published& published_;
  Engine& engine_;
  const Client client_;
  const uint64_t model_id_;
  std::vector<uint32_t> answer_;
};

// What is compared. All cases take their turns in each round, so that a disturbed minute of the
// machine disturbs them alike.
struct Case {
  std::string name;
  absl::Duration lead = absl::ZeroDuration();
  std::vector<absl::Duration> ttfts = {};
};

// Without a prefetch, and when all is in HOST.
absl::Status MeasureBounds(PrefetchRun& run, Case& none, Case& host) {
  if (absl::Status emptied = run.Empty(); !emptied.ok()) return emptied;
  for (Case* const bound : {&none, &host}) {
    const absl::StatusOr<absl::Duration> ttft = run.Request();
    if (!ttft.ok()) return ttft.status();
    bound->ttfts.push_back(*ttft);
  }
  return absl::OkStatus();
}

// What loading takes, by which head starts are measured out.
absl::StatusOr<absl::Duration> Loading(PrefetchRun& run) {
  Case none, host;
  for (int round = 0; round < kRounds; ++round) {
    if (absl::Status done = MeasureBounds(run, none, host); !done.ok()) return done;
  }
  return std::max(Median(none.ttfts) - Median(host.ttfts), absl::Milliseconds(1));
}

absl::Status Add(Bench& bench, const Case& none, const std::vector<Case>& cases, const Case& host) {
  Table table{.name = "prefetch",
              .heading = absl::StrCat("Prefetch from NVMe to HOST ahead of a request, ",
                                      bench.options().model_name, "; median of ", kRounds),
              .titles = {"prefetch", "lead ms", "TTFT ms", "loading left ms", "loading gone %"}};
  const absl::Duration all = Median(none.ttfts), nothing = Median(host.ttfts);
  const auto add = [&](const Case& added, const std::string& lead) {
    const absl::Duration ttft = Median(added.ttfts);
    table.rows.push_back({added.name, lead, Milliseconds(ttft), Milliseconds(ttft - nothing),
                          Fixed(100 * absl::FDivDuration(all - ttft, all - nothing), 0)});
    return absl::ToDoubleMilliseconds(ttft);
  };
  const double last = absl::ToDoubleMilliseconds(cases.back().lead);
  Curve curve{.title = "with prefetch"}, most{.title = "no prefetch"},
      least{.title = "all in HOST"};
  const double slowest = add(none, "-");
  most.points = {{0, slowest}, {last, slowest}};
  for (const Case& one : cases) {
    curve.points.emplace_back(absl::ToDoubleMilliseconds(one.lead),
                              add(one, Milliseconds(one.lead)));
  }
  const double quickest = add(host, "-");
  least.points = {{0, quickest}, {last, quickest}};
  absl::Status added = bench.report().Add(table);
  added.Update(bench.report().Add(
      Plot{.name = "prefetch",
           .title = absl::StrCat("Prefetch ahead of a request, ", bench.options().model_name),
           .x_label = "head start of the prefetch (ms)",
           .y_label = "time to first token (ms)",
           .curves = {most, curve, least}}));
  return added;
}

absl::Status Measure(Bench& bench, PrefetchRun& run) {
  const absl::StatusOr<absl::Duration> loading = Loading(run);
  if (!loading.ok()) return loading.status();
  Case none{.name = "none"}, host{.name = "all in HOST"};
  std::vector<Case> cases;
  for (const double lead : kLeads) {
    cases.push_back({absl::StrCat(lead, " x loading"), *loading * lead});
  }
  for (int round = 0; round < kRounds; ++round) {
    if (absl::Status done = MeasureBounds(run, none, host); !done.ok()) return done;
    for (Case& one : cases) {
      const absl::StatusOr<absl::Duration> ttft = run.RequestAfterPrefetch(one.lead);
      if (!ttft.ok()) return ttft.status();
      one.ttfts.push_back(*ttft);
    }
  }
  return Add(bench, none, cases, host);
}

}  // namespace

absl::Status RunPrefetch(Bench& bench) {
  if (absl::StatusOr<Transformer*> loaded = bench.LoadModel(); !loaded.ok()) return loaded.status();
  if (bench.on_gpu()) {
    return absl::UnimplementedError(
        "device: cuda; allowed for this experiment: cpu, for which loading ends in HOST");
  }
  absl::StatusOr<Published> published = Published::Create(bench);
  if (!published.ok()) return published.status();
  absl::StatusOr<std::unique_ptr<Engine>> engine =
      bench.NewEngine(&published->daemon(), /*publish=*/false);
  if (!engine.ok()) return engine.status();
  absl::StatusOr<Client> client = Client::Connect(published->daemon().address());
  if (!client.ok()) return client.status();
  const absl::StatusOr<v1::Model> model = client->OpenModel(bench.spec());
  if (!model.ok()) return model.status();
  PrefetchRun run(*published, **engine, *std::move(client), model->model_id());
  return Measure(bench, run);
}

}  // namespace larder::worker::bench
