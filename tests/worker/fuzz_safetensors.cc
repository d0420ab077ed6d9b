// libFuzzer: any bytes as a .safetensors file. Holds to invariant 1 of safetensors.h.

#include <cstdint>
#include <cstdlib>
#include <span>

#include "client/worker/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder::worker;
  const std::span file = std::as_bytes(std::span(data, size));
  const auto entries = ParseSafetensors(file);
  if (!entries.ok()) return 0;
  size_t total = 0;
  for (const auto& [name, entry] : *entries) {
    uint64_t expected = DtypeBytes(entry.dtype);
    for (const uint64_t extent : entry.shape) expected *= extent;
    if (entry.bytes.size() != expected) std::abort();
    if (expected == 0) continue;
    const bool inside = entry.bytes.data() >= file.data() &&
                        entry.bytes.data() + expected <= file.data() + file.size();
    if (!inside) std::abort();
    total += expected;
  }
  if (total > size) std::abort();
  return 0;
}
