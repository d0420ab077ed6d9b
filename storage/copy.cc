#include "storage/copy.h"

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace larder {
namespace {

#if defined(__SSE2__)
constexpr uint64_t kStreamFrom = 128 << 10;  // below, the caches may keep it
constexpr uint64_t kLine = 64;

// Both 16-byte aligned, `lines` whole cache lines.
void StreamLines(std::byte* to, const std::byte* from, uint64_t lines) {
  auto* out = reinterpret_cast<__m128i*>(to);
  auto* in = reinterpret_cast<const __m128i*>(from);
  for (uint64_t i = 0; i < lines; ++i, in += 4, out += 4) {
    const __m128i a = _mm_load_si128(in);
    const __m128i b = _mm_load_si128(in + 1);
    const __m128i c = _mm_load_si128(in + 2);
    const __m128i d = _mm_load_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  _mm_sfence();
}
#endif

}  // namespace

void CopyBlock(std::byte* to, const std::byte* from, uint64_t bytes) {
#if defined(__SSE2__)
  const bool aligned =
      (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % kLine == 0;
  if (aligned && bytes >= kStreamFrom) {
    StreamLines(to, from, bytes / kLine);
    const uint64_t done = bytes / kLine * kLine;
    std::memcpy(to + done, from + done, bytes - done);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace larder
