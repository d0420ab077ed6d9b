// Decode over latent rows (MLA) against the formula in double precision.
#include "tests/gpu/decode_case.h"

namespace larder::gpu_tests {
namespace {

DecodeShapeCase RandomShape(uint32_t seed) {
  std::mt19937 random(seed);
  DecodeShapeCase s{.seed = seed, .dim = 512, .rope_dim = 64};
  s.dtype = random() % 2 == 0 ? DType::kBf16 : DType::kF16;
  constexpr int32_t kHeads[] = {1, 3, 8, 16, 16, 17, 64, 128};
  s.group = kHeads[random() % 8];
  constexpr int32_t kBlockTokens[] = {1, 5, 16, 16, 64};
  s.block_tokens = kBlockTokens[random() % 5];
  if (random() % 2 == 0) {
    s.window = static_cast<int32_t>(1 + random() % 150);
    s.sinks = static_cast<int32_t>(random() % 20);
  }
  constexpr int32_t kPieceTokens[] = {0, 64, 128};
  s.piece_tokens = kPieceTokens[random() % 3];
  s.out_f32 = random() % 3 != 0;
  constexpr int32_t kPositions[] = {0, 1, 30, 31, 32, 62, 127, 200, 260};
  for (uint32_t rows = 1 + random() % 2; rows > 0; --rows) {
    s.positions.push_back(kPositions[random() % 9] + static_cast<int32_t>(random() % 2));
  }
  return s;
}

void RandomShapes(uint32_t seed) {
  DecodeCase c(RandomShape(seed));
  c.ExpectCorrect(c.Run());
}

void DeepSeeksHeads(uint32_t seed) {
  DecodeCase c({.seed = seed,
                .group = 128,
                .dim = 512,
                .rope_dim = 64,
                .piece_tokens = 64,
                .positions = {150}});
  c.ExpectCorrect(c.Run());
}

// 163 KiB hold 64 heads with a stage less, 99 KiB 16 heads.
void LessSharedMemory(uint32_t seed) {
  for (const int32_t heads : {16, 40}) {
    DecodeCase c({.seed = seed, .group = heads, .dim = 512, .rope_dim = 64, .positions = {200}});
    const AttentionResult expected = c.Run();
    {
      const SharedBytesMax less(163 * 1024);
      const AttentionResult got = c.Run();
      Expect(got.out == expected.out && got.lse == expected.lse, "the same bits with 163 KiB");
    }
    const SharedBytesMax least(99 * 1024);
    c.ExpectCorrect(c.Run());
  }
}

void NothingSeenIsZeroAndMinusInfinity(uint32_t seed) {
  DecodeCase c(
      {.seed = seed, .group = 16, .dim = 512, .rope_dim = 64, .key_begin = 50, .positions = {40}});
  ExpectNothingSeen(c.Run());
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(argc, argv,
                  std::vector<Case>{{"random_shapes", 25, RandomShapes},
                                    {"deepseeks_heads", 1, DeepSeeksHeads},
                                    {"less_shared_memory", 1, LessSharedMemory},
                                    {"nothing_seen_is_zero_and_minus_infinity", 1,
                                     NothingSeenIsZeroAndMinusInfinity}});
}
