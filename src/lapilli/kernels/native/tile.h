// The inner loops: T tokens times R vectors of output rows over all inputs.
#pragma once

#include "activations.h"

namespace lapilli {
namespace {

enum Kind {
  kPacked,      // nibbles as they lie in memory
  kUnpacked,    // a nibble in every byte
  kBytes,       // weights of 8 bits
  kGroupBytes,  // brackets of a grid, as bytes() returns them
};

// Where the R vectors of output rows of a tile lie.
template <int R>
struct Rows {
  const uint8_t* data[R];
  int64_t step;  // bytes from one group of four inputs (kPacked: eight) to the next
  const uint16_t* half[R];
  const uint8_t* zeros[R];
  const uint8_t* steps[R];
  int shift[R];  // of the nibbles of `steps`
  const int8_t* centers[R];
  const float* row[R];
  const float* bias[R];
};

// A chunk of inputs times the tokens, onto partial sums that have begun.
template <class S, Kind kind, int T, int R>
inline __attribute__((always_inline)) void dot_chunk(const Rows<R>& w, const int8_t* q, int64_t k,
                                                     typename S::P (&partial)[T][R], typename S::I (&sum)[T][R]) {
  constexpr bool signs = kind == kBytes || kind == kGroupBytes;
  constexpr int steps = kind == kPacked ? 4 : 8;
#pragma GCC unroll 8
  for (int s = 0; s < steps; ++s) {
    if (kind == kPacked) {
      typename S::W low[R], high[R];
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w.data[r] + (k / 8 + s) * w.step;
        S::nibbles(p, low[r], high[r]);
        if (T <= 2) S::prefetch(p + 4096);
      }
      const int8_t* a = q + (k / 4 + 2 * s) * (T * 4);
      for (int t = 0; t < T; ++t) {
        const typename S::W first = S::broadcast(a + t * 4), second = S::broadcast(a + (T + t) * 4);
        for (int r = 0; r < R; ++r) S::template dot<true>(partial[t][r], sum[t][r], low[r], first);
        for (int r = 0; r < R; ++r) S::template dot<true>(partial[t][r], sum[t][r], high[r], second);
      }
    } else {
      typename S::W bytes[R];
      for (int r = 0; r < R; ++r) {
        const uint8_t* p = w.data[r] + (k / 4 + s) * w.step;
        bytes[r] = kind == kBytes ? S::bytes(p) : S::small_bytes(p);
        if (kind == kBytes && T <= 2) S::prefetch(p + 4096);
      }
      const int8_t* a = q + (k / 4 + s) * (T * 4);
      for (int t = 0; t < T; ++t) {
        const typename S::W four = S::broadcast(a + t * 4);
        for (int r = 0; r < R; ++r) {
          S::template dot<!signs>(partial[t][r], sum[t][r], bytes[r], four);
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
  dot_chunk<S, kind, T, R>(w, q, k, partial, sum);
  if (kind == kPacked || kind == kUnpacked) {
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) S::end(partial[t][r], sum[t][r]);
  }
}

// A chunk of a grid, multiplied by its steps. With the correction of the chunk, sum(q * (nibble - 8)),
// it is at most 32 * 8 * 127 = 32512: 16 bits.
template <class S, Kind kind, int T, int R>
inline __attribute__((always_inline)) void add_stepped(const Rows<R>& w, const int8_t* q, const int32_t* correction,
                                                       int64_t k, typename S::I (&sum)[T][R]) {
  typename S::P partial[T][R];
  typename S::I chunk[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) S::begin_chunk(correction[t], partial[t][r], chunk[t][r]);
  dot_chunk<S, kind, T, R>(w, q, k, partial, chunk);
  for (int r = 0; r < R; ++r) {
    const typename S::I step = S::steps(w.steps[r] + k / kChunk * 8, w.shift[r]);
    for (int t = 0; t < T; ++t) S::end_chunk(partial[t][r], chunk[t][r], step, sum[t][r]);
  }
}

template <class S, Kind kind, int T, int R>
void grid_tile(const Weights& shape, const Rows<R>& w, const int8_t* q, const float* scale,
               const int32_t* correction, const int32_t* pairs, float* out, int64_t stride) {
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
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) sum[t][r] = S::izero();
    for (int64_t k = begin; k < end; k += kChunk) {
      add_stepped<S, kind, T, R>(w, q, correction + k / kChunk * T, k, sum);
    }
    for (int64_t pair = begin / (2 * kChunk); pair * 2 * kChunk < end; ++pair) {
      for (int r = 0; r < R; ++r) {
        const I centers = S::centers(w.centers[r] + pair * 2 * kBlock);
        for (int t = 0; t < T; ++t) S::add_pair(sum[t][r], centers, pairs[pair * T + t]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const F factor = S::half(w.half[r] + g * kBlock);
      for (int t = 0; t < T; ++t) {
        const F both = S::mul(factor, S::fset(scale[g * T + t]));
        acc[t][r] = S::fma(S::to_float(sum[t][r]), both, acc[t][r]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const F bias = w.bias[r] != nullptr ? S::load(w.bias[r]) : S::fzero();
    for (int t = 0; t < T; ++t) S::store(out + t * stride + r * S::kLanes, S::add(acc[t][r], bias));
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
