// Decode over keys and values of heads against the formula in double precision.
#include <cstring>

#include "tests/gpu/decode_case.h"

namespace larder::gpu_tests {
namespace {

DecodeShapeCase RandomShape(uint32_t seed) {
  std::mt19937 random(seed);
  DecodeShapeCase s;
  s.seed = seed;
  s.dtype = Pick(random, {DType::kF16, DType::kBf16});
  s.kv_heads = Pick(random, {1, 1, 2, 3});
  s.group = Pick(random, {1, 2, 3, 4, 4, 7, 8, 9, 16, 17});
  s.dim = Pick(random, {16, 32, 64, 64, 80, 96, 128, 128, 256});
  s.block_tokens = Pick(random, {1, 3, 8, 16, 16, 32, 64, 100});
  s.token_major = random() % 4 == 0;
  DrawSight(random, s);
  const int rows = static_cast<int>(1 + random() % 3);
  for (int i = 0; i < rows; ++i) {
    const int32_t position = Pick(random, {0, 1, 14, 15, 16, 62, 63, 64, 127, 255, 257, 400, 520});
    s.positions.push_back(position + static_cast<int32_t>(random() % 3));
  }
  return s;
}

void RandomShapes(uint32_t seed) {
  DecodeCase c(RandomShape(seed));
  c.ExpectCorrect(c.Run());
}

// Every head dim and storage type, with few and with many heads.
void EveryHeadDim(uint32_t seed) {
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    for (const int32_t dim : {16, 32, 64, 80, 96, 128, 256}) {
      for (const int32_t group : {4, 12}) {
        DecodeCase c(
            {.seed = seed, .dtype = dtype, .group = group, .dim = dim, .positions = {150}});
        c.ExpectCorrect(c.Run());
      }
    }
  }
}

// A row's bits depend on its pieces, not on the batch, the blocks, or who ends last.
void RowsDoNotDependOnTheBatch(uint32_t seed) {
  const DecodeShapeCase one{
      .seed = seed, .kv_heads = 2, .group = 4, .dim = 64, .piece_tokens = 128, .positions = {500}};
  DecodeCase alone(one);
  const AttentionResult expected = alone.Run();
  alone.ExpectCorrect(expected);
  for (int again = 0; again < 3; ++again) {
    const AttentionResult got = alone.Run();
    Expect(got.out == expected.out && got.lse == expected.lse, "the same call, the same bits");
  }
  DecodeShapeCase several = one;
  several.positions = {500, 37, 300};
  DecodeCase batch(several);
  // Sequence 0 is made first, so its keys are those of `alone`; its query is not.
  batch.q() = alone.q();
  batch.q().resize(3 * alone.q().size(), 0.5);
  const AttentionResult got = batch.Run();
  Expect(std::equal(expected.out.begin(), expected.out.end(), got.out.begin()) &&
             std::equal(expected.lse.begin(), expected.lse.end(), got.lse.begin()),
         "a row alone and in a batch, the same bits");
}

// Nor beside a row that sees more than 60 pieces and so has longer ones.
void RowsDoNotDependOnALongRow(uint32_t seed) {
  DecodeShapeCase s{.seed = seed, .dim = 16, .piece_tokens = 64, .positions = {500}};
  DecodeCase alone(s);
  const AttentionResult expected = alone.Run();
  s.positions = {500, 64 * 64};
  DecodeCase batch(s);
  batch.q() = alone.q();
  batch.q().resize(2 * alone.q().size(), 0.5);
  const AttentionResult got = batch.Run();
  batch.ExpectCorrect(got);
  Expect(std::equal(expected.out.begin(), expected.out.end(), got.out.begin()) &&
             expected.lse[0] == got.lse[0],
         "a row alone and beside a long one, the same bits");
}

void ManyPiecesMerge(uint32_t seed) {
  DecodeCase c({.seed = seed,
                .kv_heads = 1,
                .group = 8,
                .dim = 64,
                .piece_tokens = 64,
                .positions = {64 * 40 + 5}});
  c.ExpectCorrect(c.Run());
}

// Pieces of one length end about together: who counts before all of its threads have written is
// seen.
void TheLastBlockMerges(uint32_t seed) {
  DecodeCase c(
      {.seed = seed, .group = 2, .dim = 64, .piece_tokens = 64, .positions = {4 * 64 - 1}});
  const AttentionResult expected = c.Run();
  c.ExpectCorrect(expected);
  for (int again = 0; again < 20; ++again) {
    const AttentionResult got = c.Run();
    Expect(got.out == expected.out && got.lse == expected.lse, "the same call, the same bits");
  }
}

// Scores of some thousands: lse has 2.4e-4 to the last place there, and weights are all or nothing.
void LargeScores(uint32_t seed) {
  DecodeCase c({.seed = seed, .group = 4, .spread = 20, .positions = {300}});
  const AttentionResult result = c.Run();
  for (const double x : result.out) Expect(std::isfinite(x) && std::abs(x) < 100, "a value");
  c.params().scale = 0;  // the mean of all values
  c.ExpectCorrect(c.Run());
}

void NothingSeenIsZeroAndMinusInfinity(uint32_t seed) {
  DecodeCase c({.seed = seed, .kv_heads = 2, .group = 3, .key_begin = 400, .positions = {300, 5}});
  ExpectNothingSeen(c.Run());
}

void AVisibleNanIsNotHidden(uint32_t seed) {
  for (const int32_t piece_tokens : {0, 64}) {
    DecodeCase c({.seed = seed, .group = 2, .piece_tokens = piece_tokens, .positions = {200}});
    c.q()[3] = std::nan("");
    ExpectNanOfFirstHead(c.Run());
  }
}

// Where a block has 99 KiB of shared memory there are fewer stages, and the same bits; where it has
// less, an error that says so.
void LessSharedMemoryTheSameBits(uint32_t seed) {
  for (const auto& [dim, group] : {std::pair{128, 4}, {128, 12}, {256, 4}}) {
    DecodeCase c({.seed = seed, .group = group, .dim = dim, .positions = {400}});
    const AttentionResult expected = c.Run();
    {
      const SharedBytesMax less(99 * 1024);
      const AttentionResult got = c.Run();
      Expect(got.out == expected.out && got.lse == expected.lse, "the same bits with 99 KiB");
    }
    if (!SharedBytesMax::kHasEffect) continue;
    const SharedBytesMax too_little(64 * 1024);
    kernels::cuda::DecodeParams p = c.params();
    p.plan.piece_count = 1;
    int32_t blocks = 0;
    Expect(kernels::cuda::Decode(p, nullptr) == cudaErrorLaunchOutOfResources &&
               kernels::cuda::DecodeBlocksAtOnce(p.layer, p.q_heads, &blocks) ==
                   cudaErrorLaunchOutOfResources,
           "64 KiB are too little");
  }
}

void OtherShapesAreRefused(uint32_t seed) {
  DecodeCase c({.seed = seed, .positions = {5}});
  using kernels::cuda::Decode;
  kernels::cuda::DecodeParams p = c.params();
  p.layer.key_dim = p.layer.value_dim = 72;
  Expect(Decode(p, nullptr) == cudaErrorInvalidValue, "a head dim of 72");
  p = c.params();
  p.layer.dtype = DType::kF32;
  Expect(Decode(p, nullptr) == cudaErrorInvalidValue, "float32 storage");
  p = c.params();
  p.layer.kv_heads = 2;
  Expect(Decode(p, nullptr) == cudaErrorInvalidValue, "1 q head for 2 kv heads");
  p = c.params();
  p.layer.token_stride_bytes += 8;
  Expect(Decode(p, nullptr) == cudaErrorInvalidValue, "rows that are not aligned to 16 bytes");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(
      argc, argv,
      std::vector<Case>{
          {"random_shapes", 60, RandomShapes},
          {"every_head_dim", 1, EveryHeadDim},
          {"rows_do_not_depend_on_the_batch", 3, RowsDoNotDependOnTheBatch},
          {"rows_do_not_depend_on_a_long_row", 1, RowsDoNotDependOnALongRow},
          {"many_pieces_merge", 2, ManyPiecesMerge},
          {"the_last_block_merges", 10, TheLastBlockMerges},
          {"large_scores", 1, LargeScores},
          {"less_shared_memory_the_same_bits", 1, LessSharedMemoryTheSameBits},
          {"nothing_seen_is_zero_and_minus_infinity", 1, NothingSeenIsZeroAndMinusInfinity},
          {"a_visible_nan_is_not_hidden", 1, AVisibleNanIsNotHidden},
          {"other_shapes_are_refused", 1, OtherShapesAreRefused}});
}
