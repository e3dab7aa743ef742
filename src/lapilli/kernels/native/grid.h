// Weights rounded to 4 bits on a grid (abi.h): for every group of inputs of a row the scale, and for every
// chunk the step and the center, whose weighted squared error is least among those that are tried.
//
//   fit      every chunk alone, step and start as real numbers: rounding and least squares in turn
//   search   some scales of the group; for each of them the two steps beside the fitted one, and for each of
//            those the best start, again by rounding and least squares in turn
//   polish   the scale by least squares, where that is better
//
// A weight counts by sqrt(2 * mean square of its chunk + its square): large ones more. 16 rows go side by side.
#pragma once

#include <cmath>
#include <cstring>

#include "abi.h"
#include "pool.h"

namespace lapilli {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LaneInts __attribute__((vector_size(64)));

constexpr int64_t kMostInputs = 128;  // of a group
constexpr float kLeast = 6e-8f;       // about the smallest positive float16
constexpr float kFactors[] = {0.90f, 0.95f, 1.00f, 1.05f, 1.10f, 1.15f, 1.20f, 1.25f};  // of scales to try
constexpr float kShrink[] = {1.0f, 0.92f};  // of the range of a chunk, where its fit begins

inline Lanes lanes(float v) { return Lanes{} + v; }
inline Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }
// To the nearest, halves to even, of numbers below 2^22.
inline Lanes nearest(Lanes v) { return (v + 12582912.0f) - 12582912.0f; }
inline Lanes down(Lanes v) { return __builtin_convertvector(__builtin_convertvector(v, LaneInts), Lanes); }

// float16 of a number that is not negative, to the nearest; too large ones become infinite.
inline uint16_t to_half(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (bits >= 0x477ff000u) return 0x7c00u;
  if (bits < 0x38800000u) {  // a subnormal: a multiple of 2^-24
    const float scaled = v * 16777216.0f;
    return static_cast<uint16_t>(std::nearbyintf(scaled));
  }
  return static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

inline float from_half(uint16_t h) {
  const uint32_t exponent = h >> 10, fraction = h & 0x3ffu;
  if (exponent == 0) return static_cast<float>(fraction) / 16777216.0f;
  const uint32_t bits = exponent == 31 ? 0x7f800000u : (exponent + 112) << 23 | fraction << 13;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline Lanes as_half(Lanes v) {
  for (int i = 0; i < 16; ++i) v[i] = from_half(to_half(v[i] > kLeast ? v[i] : kLeast));
  return v;
}

struct GridChunk {
  Lanes x[kChunk], weight[kChunk];
  Lanes total;         // of the weights
  Lanes step, start;   // fitted
};

// Integers of a chunk at some scale, and their error in units of its square.
struct GridChoice {
  Lanes step, start, error;
};

inline void fit_from(const GridChunk& c, Lanes low, Lanes high, float shrink, GridChoice& best) {
  Lanes step = most((high - low) * (shrink / 15.0f), lanes(1e-12f)), start = (low + high) * 0.5f - step * 7.5f;
  for (int turn = 0; turn < 2; ++turn) {
    const Lanes factor = 1.0f / step;
    Lanes n1{}, n2{}, x1{}, xn{};
    for (int i = 0; i < kChunk; ++i) {
      const Lanes n = least(most(nearest((c.x[i] - start) * factor), lanes(0.0f)), lanes(15.0f));
      const Lanes wn = c.weight[i] * n;
      n1 += wn;
      n2 += wn * n;
      x1 += c.weight[i] * c.x[i];
      xn += wn * c.x[i];
    }
    const Lanes below = c.total * n2 - n1 * n1, next = (c.total * xn - n1 * x1) / (below > 0.0f ? below : lanes(1.0f));
    const LaneInts good = (below > 1e-20f * n2) & (next > 0.0f);
    step = good ? next : step;
    start = good ? (x1 - next * n1) / c.total : start;
  }
  Lanes error{};
  const Lanes factor = 1.0f / step;
  for (int i = 0; i < kChunk; ++i) {
    const Lanes n = least(most(nearest((c.x[i] - start) * factor), lanes(0.0f)), lanes(15.0f));
    const Lanes miss = c.x[i] - (start + step * n);
    error += c.weight[i] * miss * miss;
  }
  const LaneInts better = error < best.error;
  best = {better ? step : best.step, better ? start : best.start, better ? error : best.error};
}

inline void fit_chunk(GridChunk& c, int64_t valid) {
  Lanes squares{}, low = lanes(INFINITY), high = lanes(-INFINITY);
  for (int i = 0; i < valid; ++i) {
    squares += c.x[i] * c.x[i];
    low = least(low, c.x[i]);
    high = most(high, c.x[i]);
  }
  c.total = lanes(1e-30f);
  for (int i = 0; i < kChunk; ++i) {
    Lanes w = squares * (2.0f / static_cast<float>(valid)) + c.x[i] * c.x[i];
    for (int j = 0; j < 16; ++j) w[j] = std::sqrt(w[j]);
    c.weight[i] = i < valid ? w : Lanes{};
    c.total += c.weight[i];
  }
  GridChoice best{lanes(1e-12f), Lanes{}, lanes(INFINITY)};
  for (const float shrink : kShrink) fit_from(c, low, high, shrink, best);
  c.step = best.step;
  c.start = best.start;
}

inline Lanes inside(Lanes start, Lanes step) {
  return least(most(start, lanes(-128.0f)), 127.0f - 8.0f * step);
}

// The nibble of a weight over the scale.
inline Lanes nibble(Lanes x, Lanes start, Lanes factor, Lanes last) {
  return least(most(nearest((x - start) * factor), lanes(0.0f)), last);
}

inline Lanes last_nibble(Lanes start, Lanes step) { return least(down((127.0f - start) / step), lanes(15.0f)); }

// The error with these integers; `next` is the start that least squares would take.
inline Lanes grid_error(const GridChunk& c, Lanes per_scale, Lanes step, Lanes start, Lanes& next) {
  const Lanes factor = 1.0f / step, last = last_nibble(start, step);
  Lanes error{}, sum{};
  for (int i = 0; i < kChunk; ++i) {
    const Lanes x = c.x[i] * per_scale, rest = x - step * nibble(x, start, factor, last), miss = rest - start;
    error += c.weight[i] * miss * miss;
    sum += c.weight[i] * rest;
  }
  next = inside(nearest(sum / c.total), step);
  return error;
}

inline GridChoice choose(const GridChunk& c, Lanes per_scale) {
  const Lanes fitted = c.step * per_scale, middle = (c.start + 7.5f * c.step) * per_scale;
  GridChoice best{lanes(1.0f), Lanes{}, lanes(INFINITY)};
  for (int more = 0; more < 2; ++more) {
    const Lanes step = least(most(down(fitted) + static_cast<float>(more), lanes(1.0f)), lanes(16.0f));
    Lanes start = inside(nearest(middle - 7.5f * step), step);
    for (int turn = 0; turn < 3; ++turn) {
      Lanes next;
      const Lanes error = grid_error(c, per_scale, step, start, next);
      const LaneInts better = error < best.error;
      best = {better ? step : best.step, better ? start : best.start, better ? error : best.error};
      start = next;
    }
  }
  return best;
}

struct GridGroup {
  GridChunk chunks[kMostInputs / kChunk];
  GridChoice choices[kMostInputs / kChunk];
  Lanes scale;
};

inline void search_scale(GridGroup& g, int64_t chunks) {
  Lanes top = lanes(kLeast);
  for (int64_t c = 0; c < chunks; ++c) {
    const Lanes start = g.chunks[c].start, end = start + 15.0f * g.chunks[c].step;
    top = most(top, most(most(start, -start), most(end, -end)));
  }
  Lanes least_error = lanes(INFINITY);
  g.scale = as_half(top * (1.0f / 127.0f));
  for (const float factor : kFactors) {
    const Lanes scale = as_half(top * (factor / 127.0f)), per_scale = 1.0f / scale;
    GridChoice choices[kMostInputs / kChunk];
    Lanes error{};
    for (int64_t c = 0; c < chunks; ++c) {
      choices[c] = choose(g.chunks[c], per_scale);
      error += choices[c].error * scale * scale;
    }
    const LaneInts better = error < least_error;
    least_error = better ? error : least_error;
    g.scale = better ? scale : g.scale;
    for (int64_t c = 0; c < chunks; ++c) {
      g.choices[c].step = better ? choices[c].step : g.choices[c].step;
      g.choices[c].start = better ? choices[c].start : g.choices[c].start;
      g.choices[c].error = better ? choices[c].error * scale * scale : g.choices[c].error;
    }
  }
}

inline void polish_scale(GridGroup& g, int64_t chunks) {
  const Lanes per_scale = 1.0f / g.scale;
  Lanes above{}, below = lanes(1e-30f), error{}, unused;
  for (int64_t c = 0; c < chunks; ++c) {
    const GridChunk& chunk = g.chunks[c];
    const Lanes step = g.choices[c].step, start = g.choices[c].start, factor = 1.0f / step;
    const Lanes last = last_nibble(start, step);
    for (int i = 0; i < kChunk; ++i) {
      const Lanes bracket = start + step * nibble(chunk.x[i] * per_scale, start, factor, last);
      const Lanes weighted = chunk.weight[i] * bracket;
      above += weighted * chunk.x[i];
      below += weighted * bracket;
    }
    error += g.choices[c].error;
  }
  const Lanes scale = as_half(most(above / below, lanes(kLeast))), other = 1.0f / scale;
  Lanes found{};
  for (int64_t c = 0; c < chunks; ++c) {
    found += grid_error(g.chunks[c], other, g.choices[c].step, g.choices[c].start, unused) * scale * scale;
  }
  g.scale = found < error ? scale : g.scale;
}

inline void write_group(const RoundCall& call, int64_t block, int64_t group, const GridGroup& g, int64_t chunks) {
  const int64_t all = call.padded / kChunk, first = group * call.group / kChunk;
  for (int j = 0; j < 16; ++j) {
    call.scales[(block * ((call.padded + call.group - 1) / call.group) + group) * kBlock + j] = to_half(g.scale[j]);
  }
  const Lanes per_scale = 1.0f / g.scale;
  for (int64_t c = 0; c < chunks; ++c) {
    const GridChunk& chunk = g.chunks[c];
    const Lanes step = g.choices[c].step, start = g.choices[c].start, factor = 1.0f / step;
    const Lanes last = last_nibble(start, step);
    const int64_t at = first + c;
    uint8_t* steps = call.steps + (block * all + at) * 8;
    int8_t* centers = call.centers + (block * ((all + 1) / 2) + at / 2) * 2 * kBlock + at % 2;
    for (int j = 0; j < 16; ++j) {
      const uint8_t less = static_cast<uint8_t>(step[j]) - 1;
      steps[j % 8] = static_cast<uint8_t>(j < 8 ? less : (steps[j % 8] | less << 4));
      centers[2 * j] = static_cast<int8_t>(start[j] + 8.0f * step[j]);
    }
    uint8_t* data = call.data + (block * all + at) * kChunk * kBlock / 2;
    for (int i = 0; i < kChunk; ++i) {
      const Lanes n = nibble(chunk.x[i] * per_scale, start, factor, last);
      uint8_t* line = data + i / 8 * 64 + i % 4;
      for (int j = 0; j < 16; ++j) {
        const uint8_t value = static_cast<uint8_t>(n[j]);
        line[4 * j] = static_cast<uint8_t>(i % 8 < 4 ? value : (line[4 * j] | value << 4));
      }
    }
  }
}

// Rows of a block as lanes; false: one of them is no number or too large for a scale.
inline bool read_group(const RoundCall& call, int64_t block, int64_t begin, int64_t chunks, GridGroup& g) {
  const int64_t rows = call.rows - block * kBlock < kBlock ? call.rows - block * kBlock : kBlock;
  Lanes bad{};
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t at = begin + c * kChunk, valid = call.inputs - at < kChunk ? call.inputs - at : kChunk;
    for (int i = 0; i < kChunk; ++i) g.chunks[c].x[i] = Lanes{};
    for (int64_t j = 0; j < rows; ++j) {
      const float* row = call.w + (block * kBlock + j) * call.stride + at;
      for (int64_t i = 0; i < valid; ++i) g.chunks[c].x[i][j] = row[i];
    }
    for (int i = 0; i < valid; ++i) bad += g.chunks[c].x[i] * 0.0f;
    fit_chunk(g.chunks[c], valid);
  }
  for (int j = 0; j < 16; ++j) {
    if (bad[j] != 0.0f) return false;  // not a number either
  }
  return true;
}

template <class S>
void round_grid(const RoundCall& call) {
  const int64_t blocks = (call.rows + kBlock - 1) / kBlock, groups = (call.padded + call.group - 1) / call.group;
  for_pieces(call.threads, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      for (int64_t group = 0; group < groups; ++group) {
        GridGroup g{};
        const int64_t begin = group * call.group;
        const int64_t left = (call.padded - begin) / kChunk, most = call.group / kChunk;
        const int64_t chunks = left < most ? left : most;
        if (!read_group(call, block, begin, chunks, g)) {
          *call.refused = 1;
          return;
        }
        search_scale(g, chunks);
        polish_scale(g, chunks);
        for (int j = 0; j < 16; ++j) {
          if (!(g.scale[j] < INFINITY)) *call.refused = 1;
        }
        write_group(call, block, group, g, chunks);
      }
    }
  });
}

}  // namespace
}  // namespace lapilli
