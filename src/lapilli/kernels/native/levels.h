// Weights rounded to 4 bits with nonlinear levels (abi.h): the scale of every span of 16 inputs whose weighted
// squared error is least among those that are tried.
//
//   fit     every span alone: with both signs, from some scales, the nearest levels and then the scale by least
//           squares, in turn
//   row     the largest of its fits becomes 127
//   span    of the whole numbers around the fit over the scale of the row, the one with the least error
//
// A weight counts by sqrt(2 * mean square of its span + its square): large ones more. 16 rows go side by side.
#pragma once

#include <cmath>
#include <initializer_list>

#include "abi.h"
#include "pool.h"

namespace lapilli {
namespace {

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t LaneInts __attribute__((vector_size(64)));

constexpr float kShares[] = {1.0f, 0.9f, 0.8f};  // of the scale that covers all weights, where a fit begins
constexpr int kTurns = 2;
constexpr float kAround[] = {0.0f, -1.0f, 1.0f};  // the nearest whole scale first

inline Lanes lanes(float v) { return Lanes{} + v; }
inline Lanes least(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes most(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes positive(Lanes a) { return most(a, -a); }
// To the nearest, halves to even, of numbers below 2^22.
inline Lanes nearest(Lanes v) { return (v + 12582912.0f) - 12582912.0f; }

// The nearest level; between two of them the lower one.
inline Lanes nearest_level(Lanes v) {
  Lanes level = lanes(kLevels[0]);
  for (int i = 1; i < 16; ++i) {
    level = v > 0.5f * static_cast<float>(kLevels[i - 1] + kLevels[i]) ? lanes(kLevels[i]) : level;
  }
  return level;
}

struct Span {
  Lanes x[kSpan], weight[kSpan];
};

inline Lanes span_error(const Span& s, Lanes scale) {
  const LaneInts some = scale != 0.0f;
  const Lanes factor = some ? 1.0f / (some ? scale : lanes(1.0f)) : Lanes{};
  Lanes error{};
  for (int i = 0; i < kSpan; ++i) {
    const Lanes miss = s.x[i] - scale * nearest_level(s.x[i] * factor);
    error += s.weight[i] * miss * miss;
  }
  return error;
}

// The scale by least squares for the levels that are nearest at another one.
inline Lanes refit(const Span& s, Lanes scale) {
  const Lanes factor = 1.0f / scale;
  Lanes above{}, below{};
  for (int i = 0; i < kSpan; ++i) {
    const Lanes level = nearest_level(s.x[i] * factor), weighted = s.weight[i] * level;
    above += weighted * s.x[i];
    below += weighted * level;
  }
  return above / below;
}

// 0 for a span of zeros.
inline Lanes fit_span(const Span& s) {
  Lanes low{}, high{};
  for (int i = 0; i < kSpan; ++i) {
    low = least(low, s.x[i]);
    high = most(high, s.x[i]);
  }
  const LaneInts empty = high - low < 1e-30f;
  Lanes best{}, error = lanes(INFINITY);
  for (const float sign : {1.0f, -1.0f}) {
    const Lanes up = sign > 0 ? high : -low, down = sign > 0 ? -low : high;  // of the weights times the sign
    const Lanes covers = most(up / static_cast<float>(kLevels[15]), down / static_cast<float>(-kLevels[0]));
    for (const float share : kShares) {
      Lanes scale = empty ? lanes(1.0f) : covers * (share * sign);
      for (int turn = 0; turn < kTurns; ++turn) scale = refit(s, scale);
      const Lanes found = span_error(s, scale);
      const LaneInts better = found < error;
      best = better ? scale : best;
      error = better ? found : error;
    }
  }
  return empty ? Lanes{} : best;
}

inline void weigh(Span& s, int64_t valid) {
  Lanes squares{};
  for (int i = 0; i < kSpan; ++i) squares += s.x[i] * s.x[i];
  for (int i = 0; i < kSpan; ++i) {
    Lanes w = squares * (2.0f / static_cast<float>(valid < 1 ? 1 : valid)) + s.x[i] * s.x[i];
    for (int j = 0; j < 16; ++j) w[j] = std::sqrt(w[j]);
    s.weight[i] = i < valid ? w : Lanes{};
  }
}

// A span of a block of rows; false: one of the weights is no number.
inline bool read_span(const RoundCall& call, int64_t block, int64_t at, Span& s) {
  const int64_t left = call.rows - block * kBlock, rows = left < kBlock ? left : kBlock;
  const int64_t valid = call.inputs - at < kSpan ? call.inputs - at : kSpan;
  Lanes bad{};
  for (int i = 0; i < kSpan; ++i) s.x[i] = Lanes{};
  for (int64_t j = 0; j < rows; ++j) {
    const float* row = call.w + (block * kBlock + j) * call.stride + at;
    for (int64_t i = 0; i < valid; ++i) s.x[i][j] = row[i];
  }
  for (int i = 0; i < kSpan; ++i) bad += s.x[i] * 0.0f;
  weigh(s, valid);
  for (int j = 0; j < 16; ++j) {
    if (bad[j] != 0.0f) return false;  // not a number either
  }
  return true;
}

inline Lanes whole_scale(const Span& s, Lanes fit, Lanes row) {
  const LaneInts some = row != 0.0f;
  const Lanes middle = some ? nearest(fit / (some ? row : lanes(1.0f))) : Lanes{};
  Lanes best = middle, error = lanes(INFINITY);
  for (const float more : kAround) {
    const Lanes scale = least(most(middle + more, lanes(-127.0f)), lanes(127.0f));
    const Lanes found = span_error(s, scale * row);
    const LaneInts better = found < error;
    best = better ? scale : best;
    error = better ? found : error;
  }
  return best;
}

inline void write_span(const RoundCall& call, int64_t block, int64_t at, const Span& s, Lanes whole, Lanes row) {
  const Lanes scale = whole * row;
  const LaneInts some = scale != 0.0f;
  const Lanes factor = some ? 1.0f / (some ? scale : lanes(1.0f)) : Lanes{};
  int8_t* scales = call.span_scales + (block * call.padded + at) / kSpan * kBlock;
  uint8_t* data = call.data + (block * call.padded + at) * kBlock / 2;
  for (int j = 0; j < 16; ++j) scales[j] = static_cast<int8_t>(whole[j]);
  for (int i = 0; i < kSpan; ++i) {
    LaneInts n{};
    const Lanes v = s.x[i] * factor;
    for (int k = 1; k < 16; ++k) n -= v > 0.5f * static_cast<float>(kLevels[k - 1] + kLevels[k]);
    uint8_t* line = data + i / 8 * 64 + i % 4;
    for (int j = 0; j < 16; ++j) {
      const uint8_t value = static_cast<uint8_t>(n[j]);
      line[4 * j] = static_cast<uint8_t>(i % 8 < 4 ? value : (line[4 * j] | value << 4));
    }
  }
}

// The rows of a block; false: they do not fit.
inline bool round_block(const RoundCall& call, int64_t block, Lanes* fits) {
  const int64_t spans = call.padded / kSpan;
  Lanes top{};
  for (int64_t i = 0; i < spans; ++i) {
    Span s;
    if (!read_span(call, block, i * kSpan, s)) return false;
    fits[i] = fit_span(s);
    top = most(top, positive(fits[i]));
  }
  const Lanes row = top / 127.0f;
  for (int j = 0; j < 16; ++j) {
    if (!(row[j] < INFINITY)) return false;
    call.row_scales[block * kBlock + j] = row[j];
  }
  for (int64_t i = 0; i < spans; ++i) {
    Span s;
    read_span(call, block, i * kSpan, s);
    write_span(call, block, i * kSpan, s, whole_scale(s, fits[i], row), row);
  }
  return true;
}

template <class S>
void round_levels(const RoundCall& call) {
  const int64_t blocks = (call.rows + kBlock - 1) / kBlock;
  for_pieces(call.threads, blocks, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    Lanes* fits = reinterpret_cast<Lanes*>(scratch.get(call.padded / kSpan * static_cast<int64_t>(sizeof(Lanes))));
    for (int64_t block = first; block < last; ++block) {
      if (!round_block(call, block, fits)) {
        *call.refused = 1;
        return;
      }
    }
  });
}

}  // namespace
}  // namespace lapilli
