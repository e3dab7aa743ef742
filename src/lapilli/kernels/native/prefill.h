// Attention of many new positions per row: a piece of work is one row and some query heads of one
// head of keys.
//
//   keys    packed once per piece: panels of lanes * vectors keys, [panel][width][key], zero-padded
//   values  packed once per piece: positions side by side
//   tile    kQueryTile queries of a head: scores of all that they see -> softmax -> sum of values
#pragma once

#include "attention.h"

namespace lapilli {
namespace {

constexpr int64_t kRows = 6;         // queries of an inner loop
constexpr int64_t kQueryTile = 24;   // queries whose scores lie in the cache together

template <class S>
constexpr int panel_vectors() {
  return S::kLanes == 8 ? 2 : 4;  // AVX2 has 16 registers, the others 32
}

// Queries of a tile: where they lie, how many, and the positions that the first one sees up to.
struct Tile {
  int64_t first;
  int64_t count;
  int64_t begin;  // of the keys that any of them sees, at the start of a panel
  int64_t end;
};

struct PrefillBuffers {
  float* keys;
  float* values;
  float* queries;  // [kQueryTile, width], scaled
  float* scores;   // [kQueryTile, stride]
  float* factor;   // [kQueryTile]
  int64_t stride;
};

template <class S>
void pack_keys(const PrefillCall& call, const float* keys, float* panel) {
  constexpr int64_t wide = S::kLanes * panel_vectors<S>();
  for (int64_t first = 0; first < call.positions; first += wide) {
    const int64_t count = call.positions - first < wide ? call.positions - first : wide;
    for (int64_t d = 0; d < call.width; d += 16) {  // one line of 16 elements of every key
      for (int64_t i = 0; i < count; ++i) {
        const float* key = keys + (first + i) * call.k_position + d;
        for (int64_t j = 0; j < 16; ++j) panel[(d + j) * wide + i] = key[j];
      }
      for (int64_t j = 0; j < 16; ++j) {
        for (int64_t i = count; i < wide; ++i) panel[(d + j) * wide + i] = 0.0f;
      }
    }
    panel += call.width * wide;
  }
}

// Six queries against one panel of keys.
template <class S>
void score_panel(const float* q, const float* panel, int64_t width, float* scores, int64_t stride) {
  using F = typename S::F;
  constexpr int V = panel_vectors<S>();
  F acc[kRows][V];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = S::fzero();
  for (int64_t d = 0; d < width; ++d) {
    F key[V];
    for (int v = 0; v < V; ++v) key[v] = S::load(panel + (d * V + v) * S::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const F x = S::fset(q[r * width + d]);
      for (int v = 0; v < V; ++v) acc[r][v] = S::fma(x, key[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < V; ++v) S::store(scores + r * stride + v * S::kLanes, acc[r][v]);
}

// Weighted values of six queries, V vectors of the width.
template <class S, int V>
void mix_rows(const float* weights, int64_t stride, const float* values, int64_t width, int64_t count,
              float* out) {
  using F = typename S::F;
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const int64_t end = count - begin < kSumBlock ? count : begin + kSumBlock;
    F acc[kRows][V];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < V; ++v) acc[r][v] = S::fzero();
    for (int64_t s = begin; s < end; ++s) {
      F value[V];
      for (int v = 0; v < V; ++v) value[v] = S::load(values + s * width + v * S::kLanes);
      for (int r = 0; r < kRows; ++r) {
        const F x = S::fset(weights[r * stride + s]);
        for (int v = 0; v < V; ++v) acc[r][v] = S::fma(x, value[v], acc[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < V; ++v) {
        float* target = out + r * width + v * S::kLanes;
        S::store(target, begin == 0 ? acc[r][v] : S::add(S::load(target), acc[r][v]));
      }
  }
}

// Positions begin..end of the keys that one query sees.
inline void seen_by(const PrefillCall& call, int64_t query, int64_t& begin, int64_t& end) {
  const int64_t at = call.positions - call.queries + query;
  end = call.causal ? at + 1 : call.positions;
  begin = call.window > 0 && at + 1 > call.window ? at + 1 - call.window : 0;
}

// Scores of a query as exponentials, those that it does not see as (almost) nothing.
template <class S>
float soften_row(const PrefillCall& call, const Tile& tile, int64_t row, float slope, float* scores,
                 int64_t padded) {
  int64_t begin, end;
  seen_by(call, tile.first + row, begin, end);
  for (int64_t s = tile.begin; s < begin; ++s) scores[s - tile.begin] = -INFINITY;
  if (slope != 0.0f) {
    for (int64_t s = begin; s < end; ++s) scores[s - tile.begin] -= slope * static_cast<float>(end - 1 - s);
  }
  return soften<S>(scores, end - tile.begin, padded);
}

template <class S>
void mix_tile(const PrefillCall& call, const Tile& tile, const PrefillBuffers& at) {
  constexpr int V = panel_vectors<S>();
  const int64_t width = call.width, rows = (tile.count + kRows - 1) / kRows * kRows;
  const float* values = at.values + tile.begin * width;
  const int64_t count = tile.end - tile.begin;
  for (int64_t r = 0; r < rows; r += kRows) {
    const float* weights = at.scores + r * at.stride;
    float* out = at.queries + r * width;  // the queries are not needed any more
    int64_t lane = 0;
    for (; lane + V * S::kLanes <= width; lane += V * S::kLanes) {
      mix_rows<S, V>(weights, at.stride, values + lane, width, count, out + lane);
    }
    for (; lane < width; lane += S::kLanes) {
      mix_rows<S, 1>(weights, at.stride, values + lane, width, count, out + lane);
    }
  }
}

template <class S>
void attend_tile(const PrefillCall& call, const Tile& tile, const float* q, float* out, float slope,
                 const PrefillBuffers& at) {
  using F = typename S::F;
  constexpr int64_t wide = S::kLanes * panel_vectors<S>();
  const int64_t width = call.width, rows = (tile.count + kRows - 1) / kRows * kRows;
  const F scale = S::fset(static_cast<float>(call.scale));
  for (int64_t r = 0; r < rows; ++r) {  // those beyond the last query repeat it
    const float* from = q + (r < tile.count ? r : tile.count - 1) * call.q_position;
    for (int64_t d = 0; d < width; d += S::kLanes) {
      S::store(at.queries + r * width + d, S::mul(S::load(from + d), scale));
    }
  }
  for (int64_t first = tile.begin; first < tile.end; first += wide) {
    for (int64_t r = 0; r < rows; r += kRows) {
      score_panel<S>(at.queries + r * width, at.keys + first * width, width,
                     at.scores + r * at.stride + first - tile.begin, at.stride);
    }
  }
  const int64_t padded = (tile.end - tile.begin + 15) / 16 * 16;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r < tile.count ? r : tile.count - 1;
    at.factor[r] = soften_row<S>(call, tile, row, slope, at.scores + r * at.stride, padded);
  }
  mix_tile<S>(call, tile, at);
  for (int64_t r = 0; r < tile.count; ++r) {
    const F by = S::fset(at.factor[r]);
    for (int64_t d = 0; d < width; d += S::kLanes) {
      S::store(out + r * call.out_position + d, S::mul(S::load(at.queries + r * width + d), by));
    }
  }
}

template <class S>
PrefillBuffers prefill_buffers(const PrefillCall& call, Scratch& scratch) {
  constexpr int64_t wide = S::kLanes * panel_vectors<S>();
  PrefillBuffers at{};
  const int64_t padded = (call.positions + wide - 1) / wide * wide;
  at.stride = padded + wide;  // begins at any panel; not a power of two
  float* memory = reinterpret_cast<float*>(
      scratch.get(4 * (2 * padded * call.width + kQueryTile * (call.width + at.stride + 1))));
  at.keys = memory;
  at.values = at.keys + padded * call.width;
  at.queries = at.values + padded * call.width;
  at.scores = at.queries + kQueryTile * call.width;
  at.factor = at.scores + kQueryTile * at.stride;
  return at;
}

// Query heads first..last of a row, all of one head of keys and values.
template <class S>
void prefill_heads(const PrefillCall& call, int64_t row, int64_t first, int64_t last, Scratch& scratch) {
  constexpr int64_t wide = S::kLanes * panel_vectors<S>();
  const int64_t head = first / (call.heads / call.kv_heads);
  const PrefillBuffers at = prefill_buffers<S>(call, scratch);
  pack_keys<S>(call, call.keys + row * call.k_row + head * call.k_head, at.keys);
  const float* values = call.values + row * call.v_row + head * call.v_head;
  for (int64_t s = 0; s < call.positions; ++s) {
    std::memcpy(at.values + s * call.width, values + s * call.v_position, static_cast<size_t>(call.width) * 4);
  }
  for (int64_t h = first; h < last; ++h) {
    const float* q = call.q + row * call.q_row + h * call.q_head;
    float* out = call.out + row * call.out_row + h * call.out_head;
    for (int64_t t = 0; t < call.queries; t += kQueryTile) {
      Tile tile{};
      tile.first = t;
      tile.count = call.queries - t < kQueryTile ? call.queries - t : kQueryTile;
      int64_t unused;
      seen_by(call, t, tile.begin, unused);
      tile.begin = tile.begin / wide * wide;
      seen_by(call, t + tile.count - 1, unused, tile.end);
      attend_tile<S>(call, tile, q + t * call.q_position, out + t * call.out_position,
                     call.slopes ? call.slopes[h] : 0.0f, at);
    }
  }
}

template <class S>
void prefill(const PrefillCall& call) {
  const int64_t group = call.heads / call.kv_heads;
  // Parts of a group: more when there are too few heads of keys to share out. Each of them packs all keys,
  // which for few queries after many positions is a tenth of the work.
  int64_t parts = 1;
  const auto shares = [&]() {
    const int64_t pieces = call.batch * call.kv_heads * parts;
    return pieces >= 4 * call.threads || (pieces >= 2 * call.threads && pieces % call.threads == 0);
  };
  while (parts < group && (group % parts || !shares())) ++parts;
  const int64_t size = group / parts, pieces = call.batch * call.kv_heads * parts;
  for_pieces(call.threads, pieces, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / (call.kv_heads * parts), part = piece % (call.kv_heads * parts);
      prefill_heads<S>(call, row, part * size, (part + 1) * size, scratch);
    }
    scratch.trim();
  });
}

}  // namespace
}  // namespace lapilli
