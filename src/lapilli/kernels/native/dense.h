// Plain weights times few tokens: every weight is read once, in the order in which it lies.
#pragma once

#include "abi.h"
#include "attention.h"
#include "pool.h"

namespace lapilli {
namespace {

constexpr int64_t kDenseRows = 4;  // output rows that are read side by side

template <int64_t kind>
inline float plain(const void* base, int64_t index) {
  if constexpr (kind == kFloat32) return static_cast<const float*>(base)[index];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(base)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One number of a row's end, which fills no vector.
template <class S, int64_t kind>
inline float one_of(const void* base, int64_t index) {
  if constexpr (kind != kFloat16) return plain<kind>(base, index);
  alignas(64) uint16_t bits[S::kLanes] = {static_cast<const uint16_t*>(base)[index]};
  alignas(64) float value[S::kLanes];
  S::store(value, S::half(bits));
  return value[0];
}

// Four output rows, or fewer that repeat the last one, for T tokens.
template <class S, int64_t kind, int T>
void dense_tile(const DenseCall& call, int64_t row, int64_t token) {
  using F = typename S::F;
  const int64_t inputs = call.inputs, body = inputs / S::kLanes * S::kLanes;
  const int64_t here = call.rows - row < kDenseRows ? call.rows - row : kDenseRows;
  int64_t w[kDenseRows];
  for (int64_t r = 0; r < kDenseRows; ++r) w[r] = (row + (r < here ? r : here - 1)) * call.w_stride;
  const float* x[T];
  F acc[T][kDenseRows];
  for (int t = 0; t < T; ++t) {
    x[t] = call.x + (token + t) * call.x_stride;
    for (int r = 0; r < kDenseRows; ++r) acc[t][r] = S::fzero();
  }
  for (int64_t k = 0; k < body; k += S::kLanes) {
    F weight[kDenseRows];
    for (int r = 0; r < kDenseRows; ++r) weight[r] = load_cache<S, kind>(call.w, w[r] + k);
    for (int t = 0; t < T; ++t) {
      const F v = S::load(x[t] + k);
      for (int r = 0; r < kDenseRows; ++r) acc[t][r] = S::fma(weight[r], v, acc[t][r]);
    }
  }
  for (int t = 0; t < T; ++t) {
    float four[kDenseRows];
    S::sum4(acc[t][0], acc[t][1], acc[t][2], acc[t][3], four);
    for (int64_t r = 0; r < here; ++r) {
      float sum = four[r] + (call.bias ? call.bias[row + r] : 0.0f);
      for (int64_t k = body; k < inputs; ++k) sum += one_of<S, kind>(call.w, w[r] + k) * x[t][k];
      call.y[(token + t) * call.y_stride + row + r] = sum;
    }
  }
}

// One output row of 16-bit numbers for one token. Four side by side are four streams from memory, each of
// about a page, and take a quarter longer.
template <class S, int64_t kind>
void dense_row(const DenseCall& call, int64_t row) {
  using F = typename S::F;
  constexpr int64_t step = 4 * S::kLanes;
  const int64_t inputs = call.inputs, body = inputs / step * step;
  const float* x = call.x;
  const int64_t w = row * call.w_stride;
  F acc[4] = {S::fzero(), S::fzero(), S::fzero(), S::fzero()};
  for (int64_t k = 0; k < body; k += step) {
    for (int i = 0; i < 4; ++i) {
      acc[i] = S::fma(load_cache<S, kind>(call.w, w + k + i * S::kLanes), S::load(x + k + i * S::kLanes), acc[i]);
    }
  }
  float four[4];
  S::sum4(acc[0], acc[1], acc[2], acc[3], four);
  float sum = (four[0] + four[1]) + (four[2] + four[3]) + (call.bias ? call.bias[row] : 0.0f);
  for (int64_t k = body; k < inputs; ++k) sum += one_of<S, kind>(call.w, w + k) * x[k];
  call.y[row] = sum;
}

template <class S, int64_t kind>
void dense_rows(const DenseCall& call, int64_t begin, int64_t end) {
  constexpr int64_t most = S::kLanes == 8 ? 2 : 4;  // tokens whose sums fit the registers
  for (int64_t row = begin * kDenseRows; row < end * kDenseRows && row < call.rows; row += kDenseRows) {
    int64_t t = 0;
    if (kind != kFloat32 && call.tokens == 1) {
      for (int64_t r = row; r < row + kDenseRows && r < call.rows; ++r) dense_row<S, kind>(call, r);
      continue;
    }
    for (; t + most <= call.tokens; t += most) dense_tile<S, kind, most>(call, row, t);
    for (; t < call.tokens; ++t) dense_tile<S, kind, 1>(call, row, t);
  }
}

template <class S>
void dense(const DenseCall& call) {
  const int64_t units = (call.rows + kDenseRows - 1) / kDenseRows;
  const int64_t work = call.tokens * call.inputs * kDenseRows;
  const int64_t least = 1 + (int64_t{1} << 15) / (work + 1);
  const int64_t even = units / (call.threads * 8) + 1;
  for_pieces(call.threads, units, least > even ? least : even, [&](int64_t begin, int64_t end) {
    if (call.kind == kBfloat16) return dense_rows<S, kBfloat16>(call, begin, end);
    if (call.kind == kFloat16) return dense_rows<S, kFloat16>(call, begin, end);
    dense_rows<S, kFloat32>(call, begin, end);
  });
}

}  // namespace
}  // namespace lapilli
