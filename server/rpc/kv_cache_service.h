// KvCacheService: larder.v1.KvCache over a Cache. Decode, call, encode; kv_cache.proto is the
// contract.
//
// Thread safety: thread-safe; gRPC calls the methods from its own threads.
//
// Invariants:
//   1. No method waits: what must wait for moves is a reactor of its own.
//   2. While draining, whatever would grant a lease or reserve blocks is UNAVAILABLE.
#pragma once

#include <grpcpp/grpcpp.h>

#include "larder/v1/kv_cache.grpc.pb.h"
#include "server/rpc/context.h"
#include "server/rpc/inline_quota.h"

namespace larder {

// Download is written byte by byte (download_reactor.h), everything else as messages.
using KvCacheBase = v1::KvCache::WithRawCallbackMethod_Download<v1::KvCache::CallbackService>;

class KvCacheService final : public KvCacheBase {
 public:
  explicit KvCacheService(const RpcContext& context)
      : context_(context), inline_quota_(context.inline_bytes_max) {}

 private:
  using Context = grpc::CallbackServerContext;
  using Unary = grpc::ServerUnaryReactor;
  using KvCacheBase::Download;

  Unary* OpenModel(Context*, const v1::OpenModelRequest*, v1::Model*) override;
  grpc::ServerWriteReactor<v1::AttachEvent>* Attach(Context*, const v1::AttachRequest*) override;
  Unary* LookupPrefix(Context*, const v1::LookupPrefixRequest*, v1::LookupPrefixResponse*) override;
  grpc::ServerWriteReactor<v1::PrefetchEvent>* Prefetch(Context*,
                                                        const v1::PrefetchRequest*) override;
  Unary* Reserve(Context*, const v1::ReserveRequest*, v1::ReserveResponse*) override;
  Unary* Put(Context*, const v1::PutRequest*, v1::LeaseState*) override;
  Unary* Flush(Context*, const v1::FlushRequest*, v1::LeaseState*) override;
  Unary* Truncate(Context*, const v1::TruncateRequest*, v1::LeaseState*) override;
  Unary* Fork(Context*, const v1::ForkRequest*, v1::LeaseState*) override;
  Unary* Release(Context*, const v1::ReleaseRequest*, v1::ReleaseResponse*) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Download(Context*, const grpc::ByteBuffer*) override;

  const RpcContext& context_;
  InlineQuota inline_quota_;
};

}  // namespace larder
