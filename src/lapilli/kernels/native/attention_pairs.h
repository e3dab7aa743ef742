// Products of bfloat16, two inputs at a time, and attention made of them; for sets of instructions that
// have such a product (S::pair), which adds both to a float.
//
//   keys     panels of 64 keys, [panel][pair of the width][key]
//   values   [pair of positions][width]
//   scores   in float32; their exponentials again in pairs
#pragma once

#include <type_traits>

#include "prefill.h"
#include "store.h"

namespace lapilli {
namespace {

template <class S, class = void>
constexpr bool kHasPairs = false;
template <class S>
constexpr bool kHasPairs<S, std::enable_if_t<S::kPairs>> = true;

// Floats side by side as pairs; an even number of them.
template <class S>
void to_pairs(const float* values, int64_t count, uint32_t* pairs) {
  int64_t i = 0;
  if constexpr (kHasPairs<S>) {
    for (; i + 2 * S::kLanes <= count; i += 2 * S::kLanes) {
      S::store_pairs(pairs + i / 2, S::load(values + i), S::load(values + i + S::kLanes));
    }
  }
  for (; i < count; i += 2) {
    pairs[i / 2] = to_bfloat(values[i]) | static_cast<uint32_t>(to_bfloat(values[i + 1])) << 16;
  }
}

// T tokens against R vectors of output rows, onto what is in `out`.
template <class S, int T, int R>
void pair_tile(const uint32_t* panel, const uint32_t* x, int64_t units, float* out, int64_t stride) {
  typename S::F acc[T][R];
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) acc[t][r] = S::load(out + t * stride + r * S::kLanes);
  for (int64_t u = 0; u < units; ++u) {
    typename S::W w[R];
    for (int r = 0; r < R; ++r) w[r] = S::units(panel + (u * R + r) * S::kLanes);
    for (int t = 0; t < T; ++t) {
      const typename S::W a = S::unit(x + u * T + t);
      for (int r = 0; r < R; ++r) acc[t][r] = S::pair(acc[t][r], w[r], a);
    }
  }
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) S::store(out + t * stride + r * S::kLanes, acc[t][r]);
}

template <class S, int R>
void pair_tokens(int64_t count, const uint32_t* panel, const uint32_t* x, int64_t units, float* out, int64_t stride) {
  switch (count) {
    case 1: return pair_tile<S, 1, R>(panel, x, units, out, stride);
    case 2: return pair_tile<S, 2, R>(panel, x, units, out, stride);
    case 3: return pair_tile<S, 3, R>(panel, x, units, out, stride);
    case 4: return pair_tile<S, 4, R>(panel, x, units, out, stride);
    case 5: return pair_tile<S, 5, R>(panel, x, units, out, stride);
    default: return pair_tile<S, 6, R>(panel, x, units, out, stride);
  }
}

// Six rows, x_stride units apart, against `units` lines of V vectors, `line` units apart.
template <class S, int V>
void pair_block(const uint32_t* x, int64_t x_stride, const uint32_t* lines, int64_t line, int64_t units, float* out,
                int64_t stride) {
  using F = typename S::F;
  F acc[kRows][V];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = S::fzero();
  for (int64_t u = 0; u < units; ++u) {
    typename S::W w[V];
    for (int v = 0; v < V; ++v) w[v] = S::units(lines + u * line + v * S::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const typename S::W a = S::unit(x + r * x_stride + u);
      for (int v = 0; v < V; ++v) acc[r][v] = S::pair(acc[r][v], w[v], a);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) S::store(out + r * stride + v * S::kLanes, acc[r][v]);
}

constexpr float kLog2e = 1.44269504089f;
constexpr float kUnseen = -1e30f;  // the score of no position: its exponential is zero

// Scores of a query as exponentials in pairs, and one over their sum; a multiple of 32 of them.
template <class S>
float soften_pairs(float* scores, int64_t seen, int64_t padded, uint32_t* pairs) {
  using F = typename S::F;
  for (int64_t s = seen; s < padded; ++s) scores[s] = kUnseen;
  F most = S::load(scores);
  for (int64_t s = S::kLanes; s < padded; s += S::kLanes) most = S::max(most, S::load(scores + s));
  const F log2e = S::fset(kLog2e), top = S::fset(-kLog2e * S::most(most));
  F total = S::fzero();
  for (int64_t s = 0; s < padded; s += 2 * S::kLanes) {
    const F a = S::rough_power(S::fma(S::load(scores + s), log2e, top));
    const F b = S::rough_power(S::fma(S::load(scores + s + S::kLanes), log2e, top));
    total = S::add(total, S::add(a, b));
    S::store_pairs(pairs + s / 2, a, b);
  }
  return 1.0f / S::sum(total);
}

// Attention of every position of a tile to every other. Queries, scaled, keys and values in bfloat16, heads
// of a position side by side; up to 64 positions behind the last are read, whatever they are.
struct PairCall {
  const uint16_t* q;  // [tiles, positions, heads, width]
  const uint16_t* k;
  const uint16_t* v;
  float* out;  // likewise
  int64_t tiles;
  int64_t positions;
  int64_t heads;
  int64_t width;  // a multiple of 32
  int64_t threads;

  int64_t row() const { return heads * width; }
};

struct PairBuffers {
  uint32_t* keys;
  uint32_t* values;
  uint32_t* shares;  // [kQueryTile, stride / 2]
  float* scores;     // [kQueryTile, stride]
  float* mixed;      // [kQueryTile, wide]
  int64_t padded;    // positions, to 32
  int64_t stride;
  int64_t wide;  // width, to 64
};

inline PairBuffers pair_buffers(const PairCall& call, Scratch& scratch) {
  PairBuffers at{};
  at.padded = (call.positions + 31) / 32 * 32;
  at.stride = at.padded % 128 == 0 ? at.padded + 32 : at.padded;
  at.wide = (call.width + 63) / 64 * 64;
  const int64_t keys = (at.padded + 32) * call.width / 2, values = at.padded / 2 * at.wide;
  const int64_t shares = kQueryTile * at.stride / 2, floats = kQueryTile * (at.stride + at.wide);
  at.keys = reinterpret_cast<uint32_t*>(scratch.get(4 * (keys + values + shares + floats)));
  at.values = at.keys + keys;
  at.shares = at.values + values;
  at.scores = reinterpret_cast<float*>(at.shares + shares);
  at.mixed = at.scores + kQueryTile * at.stride;
  return at;
}

// Keys in panels and values in pairs of positions; values beyond the last are zero.
template <class S>
void pack_pairs(const PairCall& call, const uint16_t* keys, const uint16_t* values, const PairBuffers& at) {
  const int64_t half = call.width / 2, row = call.row();
  for (int64_t s = 0; s < at.padded; s += 16) {
    uint32_t* panel = at.keys + s / 64 * 64 * half + s % 64;
    for (int64_t u = 0; u < half; u += 16) {
      S::transpose(reinterpret_cast<const char*>(keys + s * row + 2 * u), row * 2, panel + u * 64, 64);
    }
  }
  const uint16_t nothing[16] = {};
  for (int64_t s = 0; s < call.positions; s += 2) {
    uint32_t* line = at.values + s / 2 * at.wide;
    for (int64_t d = 0; d < call.width; d += 16) {
      const uint16_t* first = values + s * row + d;
      S::join(line + d, first, s + 1 < call.positions ? first + row : nothing);
    }
    for (int64_t d = call.width; d < at.wide; ++d) line[d] = 0;
  }
}

// The first kQueryTile of `left` queries.
template <class S>
void attend_pair_tile(const PairCall& call, const uint16_t* q, int64_t left, float* out, const PairBuffers& at) {
  using F = typename S::F;
  const int64_t count = left < kQueryTile ? left : kQueryTile;
  const int64_t half = call.width / 2, rows = (count + kRows - 1) / kRows * kRows;
  const uint32_t* queries = reinterpret_cast<const uint32_t*>(q);
  for (int64_t first = 0; first < at.padded; first += 64) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const uint32_t *six = queries + r * call.row() / 2, *panel = at.keys + first * half;
      float* scores = at.scores + r * at.stride + first;
      if (first + 64 <= at.padded) {
        pair_block<S, 4>(six, call.row() / 2, panel, 64, half, scores, at.stride);
      } else {
        pair_block<S, 2>(six, call.row() / 2, panel, 64, half, scores, at.stride);
      }
    }
  }
  float factor[kQueryTile];
  for (int64_t r = 0; r < count; ++r) {
    factor[r] = soften_pairs<S>(at.scores + r * at.stride, call.positions, at.padded, at.shares + r * at.stride / 2);
  }
  for (int64_t lane = 0; lane < at.wide; lane += 64) {
    for (int64_t r = 0; r < rows; r += kRows) {
      pair_block<S, 4>(at.shares + r * at.stride / 2, at.stride / 2, at.values + lane, at.wide,
                       (call.positions + 1) / 2, at.mixed + r * at.wide + lane, at.wide);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const F by = S::fset(factor[r]);
    for (int64_t d = 0; d < call.width; d += S::kLanes) {
      S::store(out + r * call.row() + d, S::mul(S::load(at.mixed + r * at.wide + d), by));
    }
  }
}

template <class S>
void attend_pairs(const PairCall& call) {
  const int64_t tiles = (call.positions + kQueryTile - 1) / kQueryTile;
  int64_t parts = 1;  // of the queries of a head
  while (parts < tiles && call.tiles * call.heads * parts < 4 * call.threads) ++parts;
  for_pieces(call.threads, call.tiles * call.heads * parts, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t part = piece % parts, head = piece / parts % call.heads, row = piece / parts / call.heads;
      const int64_t from = row * call.positions * call.row() + head * call.width;
      const PairBuffers at = pair_buffers(call, scratch);
      pack_pairs<S>(call, call.k + from, call.v + from, at);
      for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
        const int64_t t = tile * kQueryTile;
        attend_pair_tile<S>(call, call.q + from + t * call.row(), call.positions - t, call.out + from + t * call.row(),
                            at);
      }
    }
    scratch.trim();
  });
}

}  // namespace
}  // namespace lapilli
