// LARDER_CHECK: what must hold if our own code is right. The world's failures are a Status.
#pragma once

#include <cstdio>
#include <cstdlib>

// Aborts the process, in every build, when `condition` is false. A message may follow.
#define LARDER_CHECK(condition, ...)                                                          \
  do {                                                                                        \
    if (!(condition)) [[unlikely]] {                                                          \
      std::fprintf(stderr, "%s:%d: check failed: %s %s\n", __FILE__, __LINE__, #condition,    \
                   "" __VA_ARGS__);                                                           \
      std::abort();                                                                           \
    }                                                                                         \
  } while (false)
