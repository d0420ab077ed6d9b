#include "server/rpc/validate.h"

#include <cmath>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace larder {
namespace {

template <typename Value>
absl::Status Bad(std::string_view field, const Value& value, std::string_view bound) {
  return absl::InvalidArgumentError(absl::StrCat(absl::string_view(field.data(), field.size()),
                                                 ": ", value, " given, ",
                                                 absl::string_view(bound.data(), bound.size())));
}

absl::Status AtMost(std::string_view field, uint64_t value, uint64_t max) {
  return value <= max ? absl::OkStatus() : Bad(field, value, absl::StrCat("at most ", max));
}

absl::Status Between(std::string_view field, uint64_t value, uint64_t min, uint64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return Bad(field, value, absl::StrCat("allowed are ", min, " to ", max));
}

template <typename... Statuses>
absl::Status FirstError(const Statuses&... statuses) {
  absl::Status first;
  (first.Update(statuses), ...);
  return first;
}

// A tier that blocks can be read or written in place.
absl::Status MappedTier(v1::Tier tier) {
  switch (tier) {
    case v1::TIER_UNSPECIFIED:
    case v1::TIER_GPU:
    case v1::TIER_HOST:
      return absl::OkStatus();
    default:
      return Bad("tier", static_cast<int>(tier), "allowed are TIER_GPU (1), TIER_HOST (2)");
  }
}

absl::Status Selector(const v1::BlockSelector& blocks) {
  if (blocks.lease_id() != 0) {
    if (blocks.tokens_size() == 0) return absl::OkStatus();
    return Bad("blocks.tokens", blocks.tokens_size(), "none allowed beside lease_id");
  }
  return AtMost("blocks.tokens", blocks.tokens_size(), kTokensMax);
}

}  // namespace

absl::Status Validate(const v1::OpenModelRequest& request) {
  if (!request.has_spec()) return absl::InvalidArgumentError("spec: missing");
  const int dtype = request.spec().dtype();
  if (dtype == v1::DTYPE_UNSPECIFIED || !v1::DType_IsValid(dtype)) {
    return Bad("spec.dtype", dtype,
               "allowed are DTYPE_F32 (1), DTYPE_F16 (2), DTYPE_BF16 (3), DTYPE_F8_E4M3 (4), "
               "DTYPE_I8 (5)");
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::AttachRequest& request) {
  if (request.worker().size() <= kWorkerNameBytesMax) return absl::OkStatus();
  return Bad("worker", absl::StrCat(request.worker().size(), " bytes"),
             absl::StrCat("at most ", kWorkerNameBytesMax));
}

absl::Status Validate(const v1::LookupPrefixRequest& request) {
  const double rate = request.prefill_tokens_per_second();
  if (!std::isfinite(rate) || rate < 0) {
    return Bad("prefill_tokens_per_second", rate, "a finite number of at least 0 needed");
  }
  if (request.peek() && request.lease_id() != 0) {
    return Bad("lease_id", request.lease_id(), "none allowed with peek");
  }
  return AtMost("tokens", request.tokens_size(), kTokensMax);
}

absl::Status Validate(const v1::PrefetchRequest& request) {
  if (!request.has_blocks()) return absl::InvalidArgumentError("blocks: missing");
  if (!v1::PrefetchPolicy_IsValid(request.policy())) {
    return Bad("policy", static_cast<int>(request.policy()),
               "allowed are PREFETCH_POLICY_BEST_EFFORT (1), PREFETCH_POLICY_WAIT_COMPLETE (2), "
               "PREFETCH_POLICY_TIMEOUT (3)");
  }
  absl::Status timeout;
  if (request.policy() == v1::PREFETCH_POLICY_TIMEOUT) {
    timeout = Between("timeout_ms", request.timeout_ms(), 1, kPrefetchTimeoutMsMax);
  } else if (request.timeout_ms() != 0) {
    timeout = Bad("timeout_ms", request.timeout_ms(), "only with PREFETCH_POLICY_TIMEOUT");
  }
  return FirstError(Selector(request.blocks()), MappedTier(request.tier()), timeout);
}

absl::Status Validate(const v1::ReserveRequest& request) {
  return FirstError(Between("count", request.count(), 1, kReserveBlocksMax),
                    MappedTier(request.tier()));
}

absl::Status Validate(const v1::PutRequest& request) {
  const absl::Status tokens = Between("tokens", request.tokens_size(), 1, kTokensMax);
  if (request.lease_id() != 0) {
    if (request.prefix_size() == 0) return tokens;
    return Bad("prefix", request.prefix_size(), "none allowed beside lease_id");
  }
  const absl::Status data = request.data().empty()
                                ? Bad("data", "0 bytes", "needed in a Put without lease_id")
                                : absl::OkStatus();
  return FirstError(tokens, AtMost("prefix", request.prefix_size(), kTokensMax), data);
}

absl::Status ValidateInline(const v1::PutRequest& request, const Model& model) {
  const uint32_t block_tokens = model.spec.block_tokens;
  const uint64_t block_bytes = model.WholeBlockBytes();
  const uint64_t tokens = request.tokens_size();
  if (tokens % block_tokens != 0) {
    return Bad("tokens", tokens, absl::StrCat("whole blocks of ", block_tokens, " needed"));
  }
  const uint64_t bytes = tokens / block_tokens * block_bytes;
  if (request.data().size() != bytes) {
    return Bad("data", absl::StrCat(request.data().size(), " bytes"),
               absl::StrCat(bytes, " needed: ", tokens / block_tokens, " blocks of ", block_bytes));
  }
  const uint64_t prefix = uint64_t{request.position()} * block_tokens;
  if (request.lease_id() == 0 && static_cast<uint64_t>(request.prefix_size()) != prefix) {
    return Bad("prefix", request.prefix_size(),
               absl::StrCat(prefix, " tokens needed: position ", request.position(), " times ",
                            block_tokens));
  }
  return absl::OkStatus();
}

absl::Status Validate(const v1::DownloadRequest& request) {
  if (!request.has_blocks()) return absl::InvalidArgumentError("blocks: missing");
  return Selector(request.blocks());
}

absl::Status Validate(const v1::ExplainRequest& request) {
  return AtMost("tokens", request.tokens_size(), kTokensMax);
}

absl::Status Validate(const v1::TopPrefixesRequest& request) {
  return AtMost("count", request.count(), kTopPrefixesMax);
}

absl::Status Validate(const v1::EvictRequest& request) {
  if (v1::Tier_IsValid(request.tier())) return absl::OkStatus();
  return Bad("tier", static_cast<int>(request.tier()),
             "allowed are TIER_GPU (1), TIER_HOST (2), TIER_NVME (3)");
}

absl::Status Validate(const v1::EchoRequest& request) {
  return FirstError(AtMost("payload", request.payload().size(), kEchoBytesMax),
                    AtMost("response_bytes", request.response_bytes(), kEchoBytesMax));
}

}  // namespace larder
