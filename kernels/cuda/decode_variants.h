// The decode kernels that are compiled apart, a file a storage type. Internal.
//
// Thread safety: pure functions.
#pragma once

#include <cstddef>

#include "kernels/cuda/decode.h"

namespace larder::kernels::cuda {

// A kernel and how it is launched: a block for each piece and each `heads` of its q heads.
struct DecodeVariant {
  void (*kernel)(DecodeParams) = nullptr;  // null: none for this shape
  int heads = 0;
  int threads = 0;
  size_t shared_bytes = 0;
};

// `group`: q heads a kv head.
DecodeVariant DecodeBf16(const KvLayer& layer, int group);
DecodeVariant DecodeF16(const KvLayer& layer, int group);
DecodeVariant CodesE4m3(const KvLayer& layer, int group);
DecodeVariant CodesInt8(const KvLayer& layer, int group);
DecodeVariant MlaBf16(int group);
DecodeVariant MlaF16(int group);

}  // namespace larder::kernels::cuda
