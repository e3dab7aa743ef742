// The inner loops: T tokens times R vectors of output rows over all inputs.
#pragma once

#include "activations.h"

namespace lapilli {
namespace {

enum Kind {
  kPacked,      // nibbles as they lie in memory
  kUnpacked,    // a nibble in every byte
  kBytes,       // weights of 8 bits
  kLevelNibbles,  // nibbles of nonlinear levels as they lie in memory
  kLevelBytes,    // their levels, as bytes() returns weights
};

// Where the R vectors of output rows of a tile lie.
template <int R>
struct Rows {
  const uint8_t* data[R];
  int64_t step;  // bytes from one group of four inputs (kPacked: eight) to the next
  const uint16_t* half[R];
  const uint8_t* zeros[R];
  const int8_t* span[R];
  const float* row[R];
  const float* bias[R];
};

constexpr int64_t kAhead = 4096;  // bytes; without it 8 tokens wait a quarter of their time for weights

// `steps` times four inputs (kPacked, kLevelNibbles: eight) times the tokens, onto partial sums that have begun.
template <class S, Kind kind, int steps, int T, int R>
inline __attribute__((always_inline)) void dot_steps(const Rows<R>& w, const int8_t* q, int64_t k,
                                                     typename S::P (&partial)[T][R], typename S::I (&sum)[T][R]) {
  constexpr bool small = kind == kPacked || kind == kUnpacked;
  constexpr bool few = R * S::kLanes == kBlock;  // tokens: weights come from memory, and are met once
#pragma GCC unroll 8
  for (int s = 0; s < steps; ++s) {
    if (kind == kPacked || kind == kLevelNibbles) {
      typename S::W low[R], high[R];
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w.data[r] + (k / 8 + s) * w.step;
        S::nibbles(p, low[r], high[r]);
        if (kind == kLevelNibbles) low[r] = S::levels(low[r]), high[r] = S::levels(high[r]);
        if (T > 1) S::prefetch(p + kAhead);  // one token keeps the memory busy without it
      }
      const int8_t* a = q + (k / 4 + 2 * s) * (T * 4);
      for (int t = 0; t < T; ++t) {
        const typename S::W first = S::broadcast(a + t * 4), second = S::broadcast(a + (T + t) * 4);
        for (int r = 0; r < R; ++r) S::template dot<small>(partial[t][r], sum[t][r], low[r], first);
        for (int r = 0; r < R; ++r) S::template dot<small>(partial[t][r], sum[t][r], high[r], second);
      }
    } else {
      typename S::W bytes[R];
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w.data[r] + (k / 4 + s) * w.step;
        bytes[r] = kind == kBytes ? S::bytes(p) : S::small_bytes(p);
        if (kind == kBytes && few && T > 1) S::prefetch(p + kAhead);
      }
      const int8_t* a = q + (k / 4 + s) * (T * 4);
      for (int t = 0; t < T; ++t) {
        const typename S::W four = S::broadcast(a + t * 4);
        for (int r = 0; r < R; ++r) {
          S::template dot<small>(partial[t][r], sum[t][r], bytes[r], four);
        }
      }
    }
  }
}

// A chunk onto sums of whole groups.
template <class S, Kind kind, int T, int R>
inline __attribute__((always_inline)) void add_chunk(const Rows<R>& w, const int8_t* q, int64_t k,
                                                     typename S::I (&sum)[T][R]) {
  typename S::P partial[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) partial[t][r] = S::begin(sum[t][r]);
  dot_steps<S, kind, kind == kPacked ? 4 : 8, T, R>(w, q, k, partial, sum);
  if (kind == kPacked || kind == kUnpacked) {
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) S::end(partial[t][r], sum[t][r]);
  }
}

// A span of nonlinear levels, scaled, onto sums of whole groups.
template <class S, Kind kind, int T, int R>
inline __attribute__((always_inline)) void add_span(const Rows<R>& w, const int8_t* q, const int32_t* correction,
                                                    int64_t k, typename S::F (&sum)[T][R]) {
  typename S::P unused[T][R];
  typename S::I span[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) span[t][r] = S::iset(correction[t]);
  dot_steps<S, kind, kind == kLevelNibbles ? 2 : 4, T, R>(w, q, k, unused, span);
  for (int r = 0; r < R; ++r) {
    const typename S::F factor = S::to_float(S::signed_lanes(w.span[r] + k / kSpan * kBlock));
    for (int t = 0; t < T; ++t) sum[t][r] = S::fma(S::to_float(span[t][r]), factor, sum[t][r]);
  }
}

// A level and an activation are at most 127: sums of a span are below 2^18 and exact as floats.
template <class S, Kind kind, int T, int R>
void level_tile(const Weights& shape, const Rows<R>& w, const int8_t* q, const float* scale,
                const int32_t* correction, float* out, int64_t stride) {
  using F = typename S::F;
  F acc[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) acc[t][r] = S::fzero();
  const int64_t padded = shape.padded();
  for (int64_t begin = 0; begin < padded; begin += shape.group, scale += T) {
    const int64_t end = begin + shape.group < padded ? begin + shape.group : padded;
    F sum[T][R];
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) sum[t][r] = S::fzero();
    for (int64_t k = begin; k < end; k += kSpan, correction += T) add_span<S, kind, T, R>(w, q, correction, k, sum);
    for (int t = 0; t < T; ++t) {
      const F token = S::fset(scale[t]);
      for (int r = 0; r < R; ++r) acc[t][r] = S::fma(sum[t][r], token, acc[t][r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const F bias = w.bias[r] != nullptr ? S::load(w.bias[r]) : S::fzero(), factor = S::load(w.row[r]);
    for (int t = 0; t < T; ++t) S::store(out + t * stride + r * S::kLanes, S::fma(acc[t][r], factor, bias));
  }
}

template <class S, Kind kind, bool zeros, int T, int R>
void dot_tile(const Weights& shape, const Rows<R>& w, const int8_t* q, const float* scale,
              const int32_t* correction, float* out, int64_t stride) {
  using F = typename S::F;
  using I = typename S::I;
  F acc[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) acc[t][r] = S::fzero();
  const int64_t padded = shape.padded(), groups = shape.groups();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * shape.group;
    const int64_t end = begin + shape.group < padded ? begin + shape.group : padded;
    I sum[T][R];
    for (int t = 0; t < T; ++t) {
      const I start = S::iset(correction[g * T + t]);
      for (int r = 0; r < R; ++r) {
        sum[t][r] = zeros ? S::imul(start, S::widen(w.zeros[r] + g * kBlock)) : start;
      }
    }
    for (int64_t k = begin; k < end; k += kChunk) add_chunk<S, kind, T, R>(w, q, k, sum);
    F factor[R];
    for (int r = 0; r < R; ++r) {
      if (kind != kBytes) factor[r] = S::half(w.half[r] + g * kBlock);
    }
    for (int t = 0; t < T; ++t) {
      const F token = S::fset(scale[g * T + t]);
      for (int r = 0; r < R; ++r) {
        const F both = kind == kBytes ? token : S::mul(factor[r], token);
        acc[t][r] = S::fma(S::to_float(sum[t][r]), both, acc[t][r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const F bias = w.bias[r] != nullptr ? S::load(w.bias[r]) : S::fzero();
    const F factor = kind == kBytes ? S::load(w.row[r]) : S::fset(1.0f);
    for (int t = 0; t < T; ++t) {
      S::store(out + t * stride + r * S::kLanes, S::fma(acc[t][r], factor, bias));
    }
  }
}

// Float activations: `panel` holds `count` inputs of the R vectors as floats, [input][vector][lane].
template <class S, int T, int R>
void float_tile(const float* panel, const float* x, int64_t count, float* out, int64_t stride) {
  typename S::F acc[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) acc[t][r] = S::load(out + t * stride + r * S::kLanes);
  for (int64_t k = 0; k < count; ++k) {
    typename S::F w[R];
    for (int r = 0; r < R; ++r) w[r] = S::load(panel + (k * R + r) * S::kLanes);
    for (int t = 0; t < T; ++t) {
      const typename S::F a = S::fset(x[k * T + t]);
      for (int r = 0; r < R; ++r) acc[t][r] = S::fma(w[r], a, acc[t][r]);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) S::store(out + t * stride + r * S::kLanes, acc[t][r]);
}

}  // namespace
}  // namespace lapilli
