#include "client/replay_request.h"

#include <algorithm>
#include <chrono>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/fill.h"
#include "xxhash.h"

namespace larder::cli {
namespace {

using SteadyClock = std::chrono::steady_clock;

// Blocks reserved and put at a time: a worker publishes its prompt in pieces, so that others
// find the beginning before the end is computed.
constexpr uint32_t kBlocksPerPut = 64;

uint64_t NanosecondsSince(SteadyClock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(SteadyClock::now() - start).count();
}

const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

class RequestRun {
 public:
  RequestRun(const Session& session, const v1::Model& model, const ReplayFlags& flags,
             const TraceRequest& request, RequestRecord& record)
      : session_(session),
        model_(model),
        flags_(flags),
        record_(record),
        tokens_(ExpandTokens(request.block_ids, model.block_tokens())),
        seeds_(BlockSeeds(model.model_id(), tokens_, model.block_tokens())) {}

  absl::Status Run(bool flush);

 private:
  // Times a call and counts its error.
  template <typename Function>
  auto Timed(Call call, Function function) {
    const auto start = SteadyClock::now();
    auto result = function();
    const uint64_t microseconds = NanosecondsSince(start) / 1000;
    const absl::Status& status = StatusOf(result);
    if (status.ok()) {
      record_.microseconds[static_cast<size_t>(call)].push_back(
          static_cast<uint32_t>(microseconds));
    } else if (!absl::IsResourceExhausted(status)) {
      const std::string what =
          absl::StrCat(std::string(CallName(call)), " ", absl::StatusCodeToString(status.code()));
      AddErrors({{what, {1, std::string(status.message())}}}, record_.errors);
    }
    return result;
  }

  absl::StatusOr<uint32_t> PrefetchTo(Lease& lease, v1::Tier tier);
  absl::Status MakeReadable(Lease& lease);
  absl::Status Verify(const Lease& lease, uint64_t i);
  absl::Status ReadHits(Lease& lease);
  absl::Status PutMissing(Lease& lease);
  absl::Status ReadAgain(Lease& lease);
  void CountServed(std::span<const BlockPlace> found, uint32_t end);

  const Session& session_;
  const v1::Model& model_;
  const ReplayFlags& flags_;
  RequestRecord& record_;
  const std::vector<uint32_t> tokens_;
  const std::vector<uint64_t> seeds_;  // one a block
};

// The first block that cannot be read in place, or the end.
uint32_t FirstUnreadable(const Lease& lease) {
  const std::span<const BlockPlace> places = lease.places().first(lease.end());
  const auto found = std::find_if(places.begin(), places.end(), [](const BlockPlace& place) {
    return place.tier != v1::TIER_GPU && place.tier != v1::TIER_HOST;
  });
  return static_cast<uint32_t>(found - places.begin());
}

// Brings what is below `tier` up to it. Answers the first block that turned out unreadable.
absl::StatusOr<uint32_t> RequestRun::PrefetchTo(Lease& lease, v1::Tier tier) {
  uint64_t arrived = 0;
  PrefetchOptions options;
  options.tier = tier;
  const auto start = SteadyClock::now();
  absl::StatusOr<PrefetchResult> result = Timed(Call::kPrefetch, [&] {
    return lease.Prefetch(options, [&](const v1::PrefetchEvent& event) {
      for (const v1::Run& run : event.runs()) arrived += run.blocks();
    });
  });
  record_.prefetch.Add({arrived * WholeBlockBytes(model_), NanosecondsSince(start)});
  if (!result.ok() && !session_.Alive()) return result.status();
  if (result.ok() && result->unreadable_position.has_value()) return *result->unreadable_position;
  return lease.end();
}

// What does not come, for whatever reason, is computed instead.
absl::Status RequestRun::MakeReadable(Lease& lease) {
  const v1::Tier highest =
      flags_.prefetch_tier == v1::TIER_UNSPECIFIED ? v1::TIER_GPU : flags_.prefetch_tier;
  const std::span<const BlockPlace> places = lease.places();
  const bool all_there = std::all_of(
      places.begin(), places.end(), [&](const BlockPlace& place) { return place.tier <= highest; });
  if (all_there) return absl::OkStatus();
  absl::StatusOr<uint32_t> end = PrefetchTo(lease, flags_.prefetch_tier);
  if (!end.ok()) return end.status();
  // The highest tier had no room for all of it: HOST is good enough to read from.
  if (*end == lease.end() && FirstUnreadable(lease) < lease.end()) {
    end = PrefetchTo(lease, v1::TIER_HOST);
    if (!end.ok()) return end.status();
  }
  end = std::min(*end, FirstUnreadable(lease));
  if (*end == lease.end()) return absl::OkStatus();
  record_.unreadable += lease.end() - *end;
  return Timed(Call::kTruncate, [&] { return lease.Truncate(*end); }).status();
}

// Part `i` of the lease: block after block, rank after rank.
absl::StatusOr<std::span<const std::byte>> PartOf(const Lease& lease, uint64_t i) {
  return lease.Block(static_cast<uint32_t>(i / lease.shards()),
                     static_cast<uint32_t>(i % lease.shards()));
}

absl::Status RequestRun::Verify(const Lease& lease, uint64_t i) {
  absl::StatusOr<std::span<const std::byte>> part = PartOf(lease, i);
  if (!part.ok()) return part.status();
  const uint64_t seed = seeds_[i / lease.shards()];
  record_.bytes_wrong +=
      WrongBytes(PartSeed(seed, static_cast<uint32_t>(i % lease.shards())), *part);
  record_.bytes_verified += part->size();
  return absl::OkStatus();
}

absl::Status RequestRun::ReadHits(Lease& lease) {
  const auto start = SteadyClock::now();
  volatile uint64_t sum = 0;  // volatile: the reading must not be optimised away
  for (uint64_t i = 0; i < uint64_t{lease.end()} * lease.shards(); ++i) {
    if (flags_.verify) {
      if (absl::Status verified = Verify(lease, i); !verified.ok()) return verified;
      continue;
    }
    absl::StatusOr<std::span<const std::byte>> part = PartOf(lease, i);
    if (!part.ok()) return part.status();
    sum = sum ^ XXH3_64bits(part->data(), part->size());
  }
  record_.read.Add({lease.end() * WholeBlockBytes(model_), NanosecondsSince(start)});
  return absl::OkStatus();
}

absl::Status RequestRun::PutMissing(Lease& lease) {
  const uint32_t blocks = static_cast<uint32_t>(seeds_.size());
  const size_t block_tokens = model_.block_tokens();
  while (lease.end() < blocks) {
    const uint32_t want = std::min(kBlocksPerPut, blocks - lease.end());
    absl::StatusOr<uint32_t> count = Timed(Call::kReserve, [&] { return lease.ReserveUpTo(want); });
    const bool full = absl::IsResourceExhausted(count.status());
    if (full || (count.ok() && *count < want)) ++record_.exhausted;
    if (full) return absl::OkStatus();
    if (!count.ok()) return count.status();
    const auto start = SteadyClock::now();
    for (uint32_t i = 0; i < *count * lease.shards(); ++i) {
      const uint32_t position = lease.end() + i / lease.shards();
      const uint32_t rank = i % lease.shards();
      absl::StatusOr<std::span<std::byte>> part = lease.Reserved(position, rank);
      if (!part.ok()) return part.status();
      FillBlock(PartSeed(seeds_[position], rank), *part);
    }
    record_.fill.Add({*count * WholeBlockBytes(model_), NanosecondsSince(start)});
    const auto tokens =
        std::span(tokens_).subspan(lease.end() * block_tokens, *count * block_tokens);
    absl::StatusOr<v1::LeaseState> put = Timed(Call::kPut, [&] { return lease.Put(tokens); });
    if (!put.ok()) return put.status();
    record_.put += *count;
  }
  return absl::OkStatus();
}

absl::Status RequestRun::ReadAgain(Lease& lease) {
  for (uint64_t i = 0; i < uint64_t{lease.end()} * lease.shards(); ++i) {
    if (absl::Status verified = Verify(lease, i); !verified.ok()) return verified;
  }
  return absl::OkStatus();
}

void RequestRun::CountServed(std::span<const BlockPlace> found, uint32_t end) {
  for (const BlockPlace& place : found.first(end)) {
    if (place.tier >= v1::TIER_GPU && place.tier <= v1::TIER_NVME) {
      ++record_.served[place.tier - v1::TIER_GPU];
    }
  }
}

absl::Status RequestRun::Run(bool flush) {
  record_.asked = seeds_.size();
  record_.computed = seeds_.size();
  absl::StatusOr<Lease> lease =
      Timed(Call::kLookup, [&] { return session_.Lookup(model_, tokens_); });
  if (!lease.ok()) return lease.status();
  const std::vector<BlockPlace> found(lease->places().begin(), lease->places().end());
  if (absl::Status readable = MakeReadable(*lease); !readable.ok()) return readable;
  if (absl::Status read = ReadHits(*lease); !read.ok()) return read;
  CountServed(found, lease->end());
  record_.computed -= lease->end();
  if (absl::Status put = PutMissing(*lease); !put.ok()) return put;
  std::this_thread::sleep_for(std::chrono::milliseconds(flags_.hold_ms));
  if (flags_.verify) {
    if (absl::Status read = ReadAgain(*lease); !read.ok()) return read;
  }
  if (flush) {
    absl::StatusOr<v1::LeaseState> flushed = Timed(Call::kFlush, [&] { return lease->Flush(); });
    if (!flushed.ok()) return flushed.status();
  }
  return Timed(Call::kRelease, [&] { return lease->Release(); });
}

}  // namespace

absl::Status ReplayRequest(const Session& session, const v1::Model& model, const ReplayFlags& flags,
                           const TraceRequest& request, bool flush, RequestRecord& record) {
  return RequestRun(session, model, flags, request, record).Run(flush);
}

}  // namespace larder::cli
