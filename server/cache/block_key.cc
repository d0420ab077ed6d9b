// The one-shot interface of OpenSSL 3 looks the digest up at every call, which costs more
// than hashing a block does; the older streaming one does not.
#define OPENSSL_API_COMPAT 0x10100000L
#include "server/cache/block_key.h"

#include <openssl/sha.h>

#include <bit>

namespace larder {

static_assert(std::endian::native == std::endian::little, "tokens are hashed as they lie");

BlockKey ChildKey(const BlockKey& parent, std::span<const uint32_t> tokens) {
  SHA256_CTX context;
  SHA256_Init(&context);
  SHA256_Update(&context, parent.bytes.data(), parent.bytes.size());
  SHA256_Update(&context, tokens.data(), tokens.size_bytes());
  BlockKey key;
  SHA256_Final(key.bytes.data(), &context);
  return key;
}

BlockKey Sha256(std::string_view bytes) {
  BlockKey key;
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), key.bytes.data());
  return key;
}

}  // namespace larder
