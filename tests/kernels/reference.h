// What the kernels are measured by: the formulas of kernels/*.h in double precision, written for
// reading, and conversions of storage that share no code with theirs.
//
// Thread safety: pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kv_layout.h"
#include "kernels/rope.h"

namespace larder::kernels::testing {

// A number of storage, and the nearest one to x, ties to even. Of one-byte storage: codes.
double Decoded(DType dtype, const std::byte* from);
void Encode(DType dtype, double x, std::byte* to);
// What storing x leaves of it.
double Rounded(DType dtype, double x);

// quantise.h's scale of a row, in double precision rounded to float32 once; 1 for other storage.
double RowScale(DType dtype, const std::vector<float>& row);
// The code that quantise.h gives x.
double RowCode(DType dtype, double x, double scale);

// One sequence's keys or values: rows[token][kv head] is a vector.
using HeadRows = std::vector<std::vector<std::vector<double>>>;

struct ReferenceQuery {
  std::vector<double> q;
  int32_t position = 0;
  int32_t kv_head = 0;
  double scale = 0;
  int32_t window = 0;
  int32_t sinks = 0;
  int32_t key_begin = 0;
  int32_t key_end = 0;
};

struct ReferenceRow {
  std::vector<double> out;
  double lse = 0;
};

// attention.h's formula for one token and q head.
ReferenceRow Attention(const ReferenceQuery& query, const HeadRows& keys, const HeadRows& values);

// rope.h's formula for one head.
void Rotate(std::vector<double>& x, int32_t begin, int32_t dim, int32_t position,
            const std::vector<double>& frequencies);
std::vector<double> Frequencies(const RopeConfig& config);

}  // namespace larder::kernels::testing
