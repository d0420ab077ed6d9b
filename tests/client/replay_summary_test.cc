#include "client/replay_summary.h"

#include <gtest/gtest.h>

namespace larder::cli {
namespace {

RequestRecord Record(uint64_t boot_id, std::array<uint64_t, 3> served, uint64_t computed) {
  RequestRecord record;
  record.boot_id = boot_id;
  record.asked = served[0] + served[1] + served[2] + computed;
  record.served = served;
  record.computed = computed;
  record.put = computed;
  return record;
}

ReplaySummary Summary(uint64_t wanted, const std::vector<RequestRecord>& records,
                      const WorkerFates& fates = {}) {
  ReplaySummary summary(wanted, /*verified=*/true);
  for (const RequestRecord& record : records) summary.Add(record);
  summary.Finish(fates, absl::Seconds(2));
  return summary;
}

TEST(Quantile, IsNearestRank) {
  EXPECT_EQ(Quantile({}, 0.5), 0u);
  EXPECT_EQ(Quantile({7}, 0.99), 7u);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 0.5), 2u);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 0.9), 4u);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 0), 1u);
  EXPECT_EQ(Quantile({1, 2, 3, 4}, 1), 4u);
}

TEST(ReplaySummary, AddsUpByBoot) {
  const ReplaySummary summary =
      Summary(3, {Record(1, {1, 2, 3}, 4), Record(2, {0, 0, 5}, 0), Record(1, {1, 0, 0}, 0)});
  const Json json = summary.ToJson();
  EXPECT_EQ(json["requests"], 3);
  EXPECT_EQ(json["block_refs"], 16);
  EXPECT_EQ(json["block_hits"], 12);
  EXPECT_EQ(json["hits_by_tier"], Json({{"gpu", 2}, {"host", 2}, {"nvme", 8}}));
  EXPECT_EQ(json["computed"], 4);
  EXPECT_EQ(json["undone"], 0);
  ASSERT_EQ(json["phases"].size(), 2u);
  EXPECT_EQ(json["phases"][0]["boot_id"], "0000000000000001");
  EXPECT_EQ(json["phases"][0]["requests"], 2);
  EXPECT_EQ(json["phases"][1]["hits_by_tier"]["nvme"], 5);
  EXPECT_EQ(summary.exit_code(), kOk);
}

TEST(ReplaySummary, ShowsOneRowABootAndOneForAll) {
  const std::string table = Summary(2, {Record(1, {1, 0, 0}, 1), Record(2, {0, 0, 2}, 0)}).Table();
  EXPECT_NE(table.find("boot 0000000000000001"), std::string::npos) << table;
  EXPECT_NE(table.find("boot 0000000000000002"), std::string::npos) << table;
  EXPECT_NE(table.find("\nall "), std::string::npos) << table;
  EXPECT_NE(table.find("1 (50.0%)"), std::string::npos) << table;
}

TEST(ReplaySummary, LatenciesOfEachCall) {
  RequestRecord record;
  record.microseconds[static_cast<size_t>(Call::kLookup)] = {30, 10, 20};
  const Json json = Summary(1, {record}).ToJson();
  EXPECT_EQ(json["calls"].size(), 1u);
  EXPECT_EQ(json["calls"]["LookupPrefix"]["count"], 3);
  EXPECT_EQ(json["calls"]["LookupPrefix"]["p50_us"], 20);
  EXPECT_EQ(json["calls"]["LookupPrefix"]["max_us"], 30);
}

TEST(ReplaySummary, WrongBytesFail) {
  RequestRecord record;
  record.bytes_wrong = 1;
  EXPECT_EQ(Summary(1, {record}).exit_code(), kFailed);
}

TEST(ReplaySummary, UnexplainedErrorsFail) {
  RequestRecord record;
  record.errors["Put ABORTED"] = {1, "position: 3"};
  EXPECT_EQ(Summary(1, {record}).exit_code(), kFailed);
  record.errors = {{"Put UNAVAILABLE", {2, ""}}, {"Prefetch DEADLINE_EXCEEDED", {1, ""}}};
  EXPECT_EQ(Summary(1, {record}).exit_code(), kOk);
}

TEST(ReplaySummary, ErrorsKeepTheFirstMessage) {
  RequestRecord first;
  first.errors["Put ABORTED"] = {1, "position: 3"};
  RequestRecord second;
  second.errors["Put ABORTED"] = {2, "position: 4"};
  const ReplaySummary summary = Summary(2, {first, second});
  EXPECT_EQ(summary.ToJson()["errors"]["Put ABORTED"],
            Json({{"count", 3}, {"example", "position: 3"}}));
  EXPECT_NE(summary.Table().find("3 errors: Put ABORTED, for example: position: 3"),
            std::string::npos);
}

TEST(ReplaySummary, UndoneRequestsFailUnlessAWorkerWasRespawned) {
  WorkerFates fates;
  fates.killed = 1;
  EXPECT_EQ(Summary(2, {RequestRecord()}, fates).exit_code(), kFailed);
  fates.respawned = 1;
  EXPECT_EQ(Summary(2, {RequestRecord()}, fates).exit_code(), kOk);
  fates.respawned = 0;
  fates.killed_in_last = 1;
  EXPECT_EQ(Summary(2, {RequestRecord()}, fates).exit_code(), kOk);
  EXPECT_EQ(Summary(3, {RequestRecord()}, fates).exit_code(), kFailed);
}

TEST(ReplaySummary, AWorkersExitCodeIsHandedOn) {
  WorkerFates fates;
  fates.failed.push_back({absl::StatusCode::kUnavailable, "no larderd answers"});
  const ReplaySummary summary = Summary(5, {}, fates);
  EXPECT_EQ(summary.exit_code(), kUnreachable);
  EXPECT_NE(summary.Table().find("1 workers gave up: no larderd"), std::string::npos);
}

}  // namespace
}  // namespace larder::cli
