// Decode over one-byte keys and values against the formula in double precision, over what the codes
// and scales say.
#include "tests/gpu/decode_case.h"

namespace larder::gpu_tests {
namespace {

constexpr DType kCodes[] = {DType::kF8E4M3, DType::kI8};

DecodeShapeCase RandomShape(uint32_t seed) {
  std::mt19937 random(seed);
  DecodeShapeCase s;
  s.seed = seed;
  s.dtype = kCodes[seed % 2];
  s.kv_heads = Pick(random, {1, 1, 2, 3});
  s.group = Pick(random, {1, 2, 3, 4, 4, 7, 8, 9, 16, 17});
  s.dim = Pick(random, {64, 64, 96, 128, 128, 256});
  s.block_tokens = Pick(random, {1, 3, 8, 16, 16, 32, 64, 100});
  DrawSight(random, s);
  const int rows = static_cast<int>(1 + random() % 3);
  for (int i = 0; i < rows; ++i) {
    s.positions.push_back(Pick(random, {0, 1, 15, 16, 63, 64, 128, 256, 401, 521}));
  }
  return s;
}

void RandomShapes(uint32_t seed) {
  DecodeCase c(RandomShape(seed));
  c.ExpectCorrect(c.Run());
}

void EveryHeadDim(uint32_t seed) {
  for (const DType dtype : kCodes) {
    for (const int32_t dim : {64, 96, 128, 256}) {
      for (const int32_t group : {4, 12}) {
        DecodeCase c(
            {.seed = seed, .dtype = dtype, .group = group, .dim = dim, .positions = {150}});
        c.ExpectCorrect(c.Run());
      }
    }
  }
}

// Values of 10^-3 and less: a weight times such a scale is below what f16 resolves, unless scales
// are folded in as exponents.
void SmallScales(uint32_t seed) {
  for (const DType dtype : kCodes) {
    DecodeCase c({.seed = seed,
                  .dtype = dtype,
                  .group = 4,
                  .piece_tokens = 2048,
                  .spread = 1e-3,
                  .positions = {2047}});
    c.params().scale = 0;
    c.ExpectCorrect(c.Run(), /*absolute=*/2e-9);
  }
}

void NothingSeenIsZeroAndMinusInfinity(uint32_t seed) {
  DecodeCase c(
      {.seed = seed, .dtype = DType::kF8E4M3, .group = 3, .key_begin = 400, .positions = {300}});
  ExpectNothingSeen(c.Run());
}

// Values of zeros have scales of zero; keys of zeros see all tokens alike.
void RowsOfZeros(uint32_t seed) {
  DecodeCase c({.seed = seed, .dtype = DType::kI8, .group = 2, .spread = 0, .positions = {40}});
  const AttentionResult result = c.Run();
  for (const double x : result.out) Expect(x == 0, "the mean of zeros is 0");
  for (const float x : result.lse)
    ExpectWithin(Distance(std::log(41.0), x), 1e-5, "lse of 41 equal scores");
}

void AVisibleNanIsNotHidden(uint32_t seed) {
  DecodeCase c({.seed = seed, .dtype = DType::kF8E4M3, .group = 2, .positions = {200}});
  c.q()[3] = std::nan("");
  ExpectNanOfFirstHead(c.Run());
}

void LessSharedMemoryTheSameBits(uint32_t seed) {
  DecodeCase c({.seed = seed, .dtype = DType::kF8E4M3, .dim = 256, .positions = {400}});
  const AttentionResult expected = c.Run();
  const SharedBytesMax less(99 * 1024);
  const AttentionResult got = c.Run();
  Expect(got.out == expected.out && got.lse == expected.lse, "the same bits with 99 KiB");
}

void OtherShapesAreRefused(uint32_t seed) {
  DecodeCase c({.seed = seed, .dtype = DType::kI8, .positions = {5}});
  const auto refused = [&](const char* what, auto change) {
    kernels::cuda::DecodeParams p = c.params();
    change(p);
    Expect(kernels::cuda::Decode(p, nullptr) == cudaErrorInvalidValue, what);
  };
  using Params = kernels::cuda::DecodeParams;
  refused("a head dim of 80", [](Params& p) { p.layer.key_dim = p.layer.value_dim = 80; });
  refused("latent rows", [](Params& p) { p.layer.latent = true; });
  refused("scales aligned to 2", [](Params& p) { p.layer.value_scale_offset_bytes += 2; });
  refused("results in bf16", [](Params& p) { p.out_dtype = DType::kBf16; });
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(
      argc, argv,
      std::vector<Case>{
          {"random_shapes", 40, RandomShapes},
          {"every_head_dim", 1, EveryHeadDim},
          {"small_scales", 1, SmallScales},
          {"less_shared_memory_the_same_bits", 1, LessSharedMemoryTheSameBits},
          {"nothing_seen_is_zero_and_minus_infinity", 1, NothingSeenIsZeroAndMinusInfinity},
          {"rows_of_zeros", 1, RowsOfZeros},
          {"a_visible_nan_is_not_hidden", 1, AVisibleNanIsNotHidden},
          {"other_shapes_are_refused", 1, OtherShapesAreRefused}});
}
