// libFuzzer: any bytes as a config.json. What is accepted passes Validate.

#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "client/worker/model_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder::worker;
  const auto config =
      ParseModelConfig(std::string_view(reinterpret_cast<const char*>(data), size));
  if (config.ok() && !Validate(*config).ok()) std::abort();
  return 0;
}
