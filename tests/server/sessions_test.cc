// Sessions: when a session may end, in every order of events.
#include "server/rpc/sessions.h"

#include <gtest/gtest.h>

#include "test_server.h"

namespace larder {
namespace {

class NullStream final : public SessionStream {
 public:
  void SendDraining(absl::Duration) override { ++drained; }
  void Close(const absl::Status&) override { ++closed; }
  int drained = 0;
  int closed = 0;
};

class SessionsTest : public testing::Test {
 protected:
  SessionId Open() {
    const auto session = server_.sessions().Open("w", stream_);
    EXPECT_TRUE(session.ok());
    OpenSmallModel(server_);
    return *session;
  }
  uint64_t Count() {
    const CacheStats stats = server_.cache().Stats();
    return stats.sessions + stats.sessions_lost;
  }

  TestServer server_;
  std::shared_ptr<NullStream> stream_ = std::make_shared<NullStream>();
};

TEST_F(SessionsTest, NeverMappedEndsWithItsStream) {
  const SessionId session = Open();
  server_.sessions().StreamEnded(session);
  EXPECT_EQ(Count(), 0u);
  server_.sessions().ProcessGone(session);  // too late, and harmless
}

TEST_F(SessionsTest, ProcessGoneFirst) {
  const SessionId session = Open();
  server_.Map(session, 9);
  server_.Unmap(session);
  EXPECT_EQ(stream_->closed, 1);
  EXPECT_EQ(Count(), 0u);
  server_.sessions().StreamEnded(session);
  EXPECT_TRUE(server_.sessions().AwaitNoStreams(absl::Now()));
}

TEST_F(SessionsTest, AHoldIsASessionThatNobodyElseCanName) {
  {
    const auto hold = server_.sessions().OpenHold();
    ASSERT_TRUE(hold.ok());
    EXPECT_EQ(Count(), 1u);
    EXPECT_FALSE(server_.sessions().IsLive(hold->session())) << "no addresses for it";
    EXPECT_FALSE(server_.sessions().AwaitNoHolds(absl::Now()));
    EXPECT_NE(hold->session(), server_.sessions().OpenHold()->session());
    ASSERT_EQ(server_.cache().Sessions(/*leases=*/false).size(), 1u);
    EXPECT_EQ(server_.cache().Sessions(/*leases=*/false)[0].session, 0u);
  }
  EXPECT_EQ(Count(), 0u);
  EXPECT_TRUE(server_.sessions().AwaitNoHolds(absl::Now()));
}

TEST_F(SessionsTest, DrainTellsOpenStreamsAndOpensNoMore) {
  const SessionId session = Open();
  server_.sessions().Drain(absl::Seconds(1));
  EXPECT_EQ(stream_->drained, 1);
  EXPECT_EQ(server_.sessions().Open("late", stream_).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_TRUE(server_.sessions().OpenHold().ok()) << "what a worker has begun goes on";
  server_.sessions().StreamEnded(session);
}

}  // namespace
}  // namespace larder
