// MergeAttention: parts of the keys by Decode, merged into the whole; and its special cases.
#include "kernels/cuda/merge.h"
#include "tests/gpu/decode_case.h"

namespace larder::gpu_tests {
namespace {

using kernels::cuda::MergeAttention;
using kernels::cuda::MergeParams;

// Random results of random parts against the formula in double.
void PartsMerge(uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  MergeParams p;
  p.parts = static_cast<int32_t>(1 + random() % kernels::cuda::kMergePartsMax);
  p.rows = static_cast<int64_t>(1 + random() % 40);
  p.dim = static_cast<int32_t>(1 + random() % 200);
  std::vector<std::vector<float>> outs(p.parts);
  std::vector<std::vector<float>> lses(p.parts);
  std::vector<std::unique_ptr<DeviceArray<float>>> arrays;
  for (int i = 0; i < p.parts; ++i) {
    for (int64_t r = 0; r < p.rows; ++r) {
      // A part that saw nothing may hold anything.
      const bool none = random() % 5 == 0;
      lses[i].push_back(none ? -HUGE_VALF : 20 * normal(random));
      for (int32_t at = 0; at < p.dim; ++at) {
        outs[i].push_back(none ? std::nanf("") : normal(random));
      }
    }
    arrays.push_back(std::make_unique<DeviceArray<float>>(outs[i]));
    p.outs[i] = arrays.back()->data();
    arrays.push_back(std::make_unique<DeviceArray<float>>(lses[i]));
    p.lses[i] = arrays.back()->data();
  }
  DeviceArray<float> out(p.rows * p.dim);
  DeviceArray<float> lse(p.rows);
  const bool in_place = random() % 2 == 0;
  p.out = in_place ? arrays[0]->data() : out.data();
  p.lse = in_place ? arrays[1]->data() : lse.data();
  Require(MergeAttention(p, nullptr), "MergeAttention");
  const std::vector<float> merged = in_place ? arrays[0]->Host() : out.Host();
  const std::vector<float> merged_lse = in_place ? arrays[1]->Host() : lse.Host();
  for (int64_t r = 0; r < p.rows; ++r) {
    double most = -HUGE_VAL;
    for (int i = 0; i < p.parts; ++i) most = std::max<double>(most, lses[i][r]);
    double sum = 0;
    for (int i = 0; i < p.parts && most > -HUGE_VAL; ++i) sum += std::exp(lses[i][r] - most);
    const double expected_lse = most + (sum > 0 ? std::log(sum) : 0);
    ExpectWithin(Distance(expected_lse, merged_lse[r]), 2e-5, "lse");
    for (int32_t at = 0; at < p.dim; ++at) {
      double expected = 0;
      for (int i = 0; i < p.parts; ++i) {
        if (lses[i][r] == -HUGE_VALF) continue;
        expected += std::exp(lses[i][r] - expected_lse) * outs[i][r * p.dim + at];
      }
      // lse * log2(e) of some tens is off by 4e-6.
      ExpectWithin(Distance(expected, merged[r * p.dim + at]), 4e-5, "out");
    }
  }
}

// A row over all keys is the merge of the row over the first and over the rest of them.
void PartsOfTheKeysMergeIntoTheWhole(uint32_t seed) {
  DecodeShapeCase shape{.seed = seed, .kv_heads = 2, .group = 4, .dim = 64, .positions = {300, 40}};
  DecodeCase whole(shape);
  shape.key_end = static_cast<int32_t>(100 + seed);
  const AttentionResult first = DecodeCase(shape).Run();
  shape.key_begin = shape.key_end;
  shape.key_end = std::numeric_limits<int32_t>::max();
  const AttentionResult rest = DecodeCase(shape).Run();
  std::vector<std::unique_ptr<DeviceArray<float>>> arrays;
  MergeParams p{.parts = 2, .rows = 16, .dim = 64};
  for (const AttentionResult* part : {&first, &rest}) {
    const int i = part == &rest;
    arrays.push_back(std::make_unique<DeviceArray<float>>(
        std::vector<float>(part->out.begin(), part->out.end())));
    p.outs[i] = arrays.back()->data();
    arrays.push_back(std::make_unique<DeviceArray<float>>(part->lse));
    p.lses[i] = arrays.back()->data();
  }
  DeviceArray<float> out(p.rows * p.dim);
  DeviceArray<float> lse(p.rows);
  p.out = out.data();
  p.lse = lse.data();
  Require(MergeAttention(p, nullptr), "MergeAttention");
  const std::vector<float> merged = out.Host();
  whole.ExpectCorrect({{merged.begin(), merged.end()}, lse.Host()});
}

void OtherNumbersOfPartsAreRefused(uint32_t /*seed*/) {
  Expect(MergeAttention({.parts = 0, .rows = 1, .dim = 1}, nullptr) == cudaErrorInvalidValue,
         "no part");
  Expect(MergeAttention({.parts = 17, .rows = 1, .dim = 1}, nullptr) == cudaErrorInvalidValue,
         "17 parts");
  Expect(MergeAttention({.parts = 1, .rows = 0, .dim = 1}, nullptr) == cudaSuccess, "no rows");
}

}  // namespace
}  // namespace larder::gpu_tests

int main(int argc, char** argv) {
  using namespace larder::gpu_tests;  // NOLINT
  return RunCases(
      argc, argv,
      std::vector<Case>{
          {"parts_merge", 30, PartsMerge},
          {"parts_of_the_keys_merge_into_the_whole", 3, PartsOfTheKeysMergeIntoTheWhole},
          {"other_numbers_of_parts_are_refused", 1, OtherNumbersOfPartsAreRefused}});
}
