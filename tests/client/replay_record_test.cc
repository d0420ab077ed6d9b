#include "client/replay_record.h"

#include <gtest/gtest.h>

#include "client/replay.h"

namespace larder::cli {
namespace {

RequestRecord SomeRecord() {
  RequestRecord record;
  record.index = 17;
  record.boot_id = ~uint64_t{0};
  record.interrupted = true;
  record.asked = 10;
  record.served = {1, 2, 3};
  record.computed = 4;
  record.unreadable = 1;
  record.put = 2;
  record.exhausted = 1;
  record.bytes_verified = 1 << 20;
  record.bytes_wrong = 3;
  record.prefetch = {100, 200};
  record.read = {300, 400};
  record.fill = {500, 600};
  record.microseconds[static_cast<size_t>(Call::kPut)] = {70, 80};
  record.errors["Put UNAVAILABLE"] = {2, "away"};
  return record;
}

TEST(ReplayRecord, SurvivesThePipe) {
  for (const WorkerLine& line :
       {WorkerLine(SomeRecord()), WorkerLine(RequestRecord()), WorkerLine(Reconnected()),
        WorkerLine(WorkerFailed{absl::StatusCode::kUnavailable, "gone"})}) {
    absl::StatusOr<WorkerLine> parsed = ParseLine(FormatLine(line));
    ASSERT_TRUE(parsed.ok()) << FormatLine(line);
    EXPECT_EQ(*parsed, line);
  }
}

TEST(ReplayRecord, RefusesAnythingElse) {
  const std::string good = FormatLine(SomeRecord());
  for (const std::string& bad :
       {std::string(), std::string("{}"), std::string("[]"), std::string("{\"request\":{}}"),
        std::string("{\"failed\":{\"code\":\"x\",\"message\":1}}"), good.substr(0, good.size() / 2),
        std::string("{\"other\":1}")}) {
    EXPECT_FALSE(ParseLine(bad).ok()) << bad;
  }
}

TEST(ReplayShares, EveryRequestHasOneWorker) {
  ReplayFlags flags;
  flags.workers = 3;
  flags.skip = 5;
  for (uint64_t index = 5; index < 50; ++index) {
    int owners = 0;
    for (uint64_t worker = 0; worker < flags.workers; ++worker) {
      owners += IsShareOf(index, flags, worker);
    }
    EXPECT_EQ(owners, 1) << index;
  }
  EXPECT_TRUE(IsShareOf(5, flags, 0));
}

}  // namespace
}  // namespace larder::cli
