// Packed weights times activations: who computes which rows, and where the results go.
//
//   few tokens    packed weights straight from memory, one pass
//   many tokens   the nibbles of a few rows are unpacked once into the cache, then met by every tile
//   tiles         many tokens where the CPU has them: matrix.h
//   weight only   the same rows as floats, a piece of the inputs at a time
#pragma once

#include <type_traits>

#include "matrix.h"
#include "tile.h"

namespace lapilli {
namespace {

constexpr int64_t kFloatFew = 8;      // tokens; above this a panel of floats pays
constexpr int64_t kFloatPiece = 128;  // inputs of a float panel

template <class S, int R>
Rows<R> rows_at(const Weights& w, int64_t vector) {
  constexpr int64_t parts = kBlock / S::kLanes;  // vectors of a block
  Rows<R> rows{};
  rows.step = 64;
  for (int r = 0; r < R; ++r) {
    const int64_t block = (vector + r) / parts, lane = (vector + r) % parts * S::kLanes;
    rows.data[r] = w.data + block * w.block_bytes() + lane * 4;
    if (w.half_scales) rows.half[r] = w.half_scales + block * w.groups() * kBlock + lane;
    if (w.zeros) rows.zeros[r] = w.zeros + block * w.groups() * kBlock + lane;
    if (w.span_scales) rows.span[r] = w.span_scales + block * w.spans() * kBlock + lane;
    if (w.row_scales) rows.row[r] = w.row_scales + block * kBlock + lane;
    if (w.bias) rows.bias[r] = w.bias + block * kBlock + lane;
  }
  return rows;
}

template <class S, Kind kind, bool zeros, int R>
void dot_tokens(int64_t count, const Weights& shape, const Rows<R>& w, const int8_t* q, const float* scale,
                const int32_t* correction, float* out, int64_t stride) {
  switch (count) {
    case 1: return dot_tile<S, kind, zeros, 1, R>(shape, w, q, scale, correction, out, stride);
    case 2: return dot_tile<S, kind, zeros, 2, R>(shape, w, q, scale, correction, out, stride);
    case 3: return dot_tile<S, kind, zeros, 3, R>(shape, w, q, scale, correction, out, stride);
    case 4: return dot_tile<S, kind, zeros, 4, R>(shape, w, q, scale, correction, out, stride);
  }
  if constexpr (S::kTokens > 4) {
    if (count == 5) return dot_tile<S, kind, zeros, 5, R>(shape, w, q, scale, correction, out, stride);
    if (count == 6) return dot_tile<S, kind, zeros, 6, R>(shape, w, q, scale, correction, out, stride);
  }
  if constexpr (S::kFew > S::kTokens && R * S::kLanes == kBlock) {
    if (count == 7) return dot_tile<S, kind, zeros, 7, R>(shape, w, q, scale, correction, out, stride);
    return dot_tile<S, kind, zeros, 8, R>(shape, w, q, scale, correction, out, stride);
  }
}

template <class S, Kind kind, int R>
void level_tokens(int64_t count, const Weights& shape, const Rows<R>& w, const int8_t* q, const float* scale,
                 const int32_t* correction, float* out, int64_t stride) {
  switch (count) {
    case 1: return level_tile<S, kind, 1, R>(shape, w, q, scale, correction, out, stride);
    case 2: return level_tile<S, kind, 2, R>(shape, w, q, scale, correction, out, stride);
    case 3: return level_tile<S, kind, 3, R>(shape, w, q, scale, correction, out, stride);
    case 4: return level_tile<S, kind, 4, R>(shape, w, q, scale, correction, out, stride);
  }
  if constexpr (S::kTokens > 4) {
    if (count == 5) return level_tile<S, kind, 5, R>(shape, w, q, scale, correction, out, stride);
    if (count == 6) return level_tile<S, kind, 6, R>(shape, w, q, scale, correction, out, stride);
  }
  if constexpr (S::kFew > S::kTokens && R * S::kLanes == kBlock) {
    if (count == 7) return level_tile<S, kind, 7, R>(shape, w, q, scale, correction, out, stride);
    return level_tile<S, kind, 8, R>(shape, w, q, scale, correction, out, stride);
  }
}

template <class S, int R>
void float_tokens(int64_t count, const float* panel, const float* x, int64_t inputs, float* out,
                  int64_t stride) {
  switch (count) {
    case 1: return float_tile<S, 1, R>(panel, x, inputs, out, stride);
    case 2: return float_tile<S, 2, R>(panel, x, inputs, out, stride);
    case 3: return float_tile<S, 3, R>(panel, x, inputs, out, stride);
    case 4: return float_tile<S, 4, R>(panel, x, inputs, out, stride);
  }
  if constexpr (S::kTokens > 4) {
    if (count == 5) return float_tile<S, 5, R>(panel, x, inputs, out, stride);
    return float_tile<S, 6, R>(panel, x, inputs, out, stride);
  }
}

// Nibbles of R vectors, or their nonlinear levels, as bytes, [input / 4][vector][lane][input % 4].
template <class S, bool levels, int R>
Rows<R> unpack(const Weights& w, Rows<R> rows, uint8_t* panel) {
  constexpr int64_t width = S::kLanes * 4;
  for (int64_t k = 0; k < w.padded() / 8; ++k) {
    for (int r = 0; r < R; ++r) {
      typename S::W low, high;
      S::nibbles(rows.data[r] + k * rows.step, low, high);
      if (levels) low = S::levels(low), high = S::levels(high);
      S::store_bytes(panel + (2 * k * R + r) * width, low);
      S::store_bytes(panel + ((2 * k + 1) * R + r) * width, high);
    }
  }
  for (int r = 0; r < R; ++r) rows.data[r] = panel + r * width;
  rows.step = R * width;
  return rows;
}

// One group of four inputs of a vector as floats: (byte - zero) * scale.
template <class S, int R>
inline void widen_four(const uint8_t* p, typename S::F scale, typename S::F shift, float* out) {
  const typename S::W w = S::small_bytes(p);
  constexpr int64_t next = R * S::kLanes;
  S::store(out, S::fma(S::to_float(S::template byte<0>(w)), scale, shift));
  S::store(out + next, S::fma(S::to_float(S::template byte<1>(w)), scale, shift));
  S::store(out + 2 * next, S::fma(S::to_float(S::template byte<2>(w)), scale, shift));
  S::store(out + 3 * next, S::fma(S::to_float(S::template byte<3>(w)), scale, shift));
}

// Levels of nibbles + 128, as weights of 8 bits lie in memory.
template <class S>
inline typename S::W level_bytes(typename S::W nibbles) {
  alignas(64) uint8_t bytes[64];
  S::store_bytes(bytes, S::levels(nibbles));
  for (int i = 0; i < S::kLanes * 4; ++i) bytes[i] = static_cast<uint8_t>(bytes[i] + 128 - S::kByteBias);
  return S::small_bytes(bytes);
}

// Inputs begin..end of R vectors as floats, [input][vector][lane].
template <class S, int R>
void dequantize(const Weights& w, const Rows<R>& rows, int64_t begin, int64_t end, float* panel) {
  using F = typename S::F;
  constexpr int64_t next = R * S::kLanes;
  alignas(64) uint8_t bytes[128];
  for (int r = 0; r < R; ++r) {
    for (int64_t k = begin; k < end; k += 8) {
      const int64_t group = k / w.group * kBlock;
      float* out = panel + (k - begin) * next + r * S::kLanes;
      if (w.bits == 8) {
        const F scale = S::load(rows.row[r]), shift = S::mul(scale, S::fset(-128.0f));
        widen_four<S, R>(rows.data[r] + k / 4 * 64, scale, shift, out);
        widen_four<S, R>(rows.data[r] + (k / 4 + 1) * 64, scale, shift, out + 4 * next);
        continue;
      }
      F scale, shift;
      typename S::W low, high;
      S::nibbles(rows.data[r] + k / 8 * 64, low, high);
      if (w.span_scales) {
        scale = S::mul(S::load(rows.row[r]), S::to_float(S::signed_lanes(rows.span[r] + k / kSpan * kBlock)));
        shift = S::mul(scale, S::fset(-128.0f));
        low = level_bytes<S>(low), high = level_bytes<S>(high);
      } else {
        scale = S::half(rows.half[r] + group);
        const F zero = w.zeros ? S::to_float(S::widen(rows.zeros[r] + group)) : S::fset(8.0f);
        shift = S::mul(S::mul(scale, zero), S::fset(-1.0f));
      }
      S::store_bytes(bytes, low);
      S::store_bytes(bytes + 64, high);
      widen_four<S, R>(bytes, scale, shift, out);
      widen_four<S, R>(bytes + 64, scale, shift, out + 4 * next);
    }
  }
}

// Four inputs of a vector, step * byte + start, against T tokens.
template <class S, int T>
inline void meet_four(typename S::W w, typename S::F step, typename S::F start, const float* x,
                      typename S::F (&sum)[T][2]) {
  using F = typename S::F;
  const F four[4] = {S::fma(S::to_float(S::template byte<0>(w)), step, start),
                     S::fma(S::to_float(S::template byte<1>(w)), step, start),
                     S::fma(S::to_float(S::template byte<2>(w)), step, start),
                     S::fma(S::to_float(S::template byte<3>(w)), step, start)};
  for (int j = 0; j < 4; ++j) {
    for (int t = 0; t < T; ++t) sum[t][j & 1] = S::fma(four[j], S::fset(x[j * T + t]), sum[t][j & 1]);
  }
}

// Float activations of few tokens: weights widened in registers, one pass over them.
template <class S, int T>
void float_direct(const Weights& w, const Rows<1>& rows, const float* x, float* out, int64_t stride) {
  using F = typename S::F;
  F acc[T];
  for (int t = 0; t < T; ++t) acc[t] = rows.bias[0] ? S::load(rows.bias[0]) : S::fzero();
  const int64_t padded = w.padded(), groups = w.groups();
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * w.group;
    const int64_t end = begin + w.group < padded ? begin + w.group : padded;
    F step = S::fset(1.0f), start = S::fset(w.bits == 8 ? -128.0f : -8.0f);
    if (w.zeros) start = S::sub(S::fzero(), S::to_float(S::widen(rows.zeros[0] + g * kBlock)));
    F sum[T][2];
    for (int t = 0; t < T; ++t) sum[t][0] = sum[t][1] = S::fzero();
    if (w.bits == 8) {
      for (int64_t k = begin; k < end; k += 4) {
        meet_four<S, T>(S::small_bytes(rows.data[0] + k * 16), step, start, x + k * T, sum);
      }
    } else {
      for (int64_t k = begin; k < end; k += 8) {
        typename S::W low, high;
        S::nibbles(rows.data[0] + k * 8, low, high);
        if (w.span_scales) {
          step = S::to_float(S::signed_lanes(rows.span[0] + k / kSpan * kBlock));
          start = S::mul(step, S::fset(-128.0f));
          low = level_bytes<S>(low), high = level_bytes<S>(high);
        }
        S::prefetch(rows.data[0] + k * 8 + 2048);
        meet_four<S, T>(low, step, start, x + k * T, sum);
        meet_four<S, T>(high, step, start, x + (k + 4) * T, sum);
      }
    }
    const F scale = rows.row[0] ? S::load(rows.row[0]) : S::half(rows.half[0] + g * kBlock);
    for (int t = 0; t < T; ++t) acc[t] = S::fma(S::add(sum[t][0], sum[t][1]), scale, acc[t]);
  }
  for (int t = 0; t < T; ++t) S::store(out + t * stride, acc[t]);
}

template <class S>
void float_few(const LinearCall& call, const Activations& a, int64_t vector, float* out, int64_t stride) {
  const Weights& w = call.weights;
  const Rows<1> rows = rows_at<S, 1>(w, vector);
  for (int64_t first = 0; first < call.tokens; first += S::kTokens) {
    const float* x = a.x + first * w.padded();
    float* y = out + first * stride;
    switch (tokens_of_tile(call.tokens, first / S::kTokens, S::kTokens)) {
      case 1: float_direct<S, 1>(w, rows, x, y, stride); break;
      case 2: float_direct<S, 2>(w, rows, x, y, stride); break;
      case 3: float_direct<S, 3>(w, rows, x, y, stride); break;
      case 4: float_direct<S, 4>(w, rows, x, y, stride); break;
      default:
        if constexpr (S::kTokens > 4) {
          if (call.tokens - first == 5) {
            float_direct<S, 5>(w, rows, x, y, stride);
          } else {
            float_direct<S, 6>(w, rows, x, y, stride);
          }
        }
    }
  }
}

template <class S, bool zeros, int R>
void dot_rows(const LinearCall& call, const Activations& a, int64_t vector, Scratch& scratch, float* out,
              int64_t stride) {
  const Weights& w = call.weights;
  const int64_t padded = w.padded(), groups = w.groups();
  Rows<R> rows = rows_at<S, R>(w, vector);
  const bool unpacked = unpacks<S>(call);
  if (unpacked) rows = unpack<S, false, R>(w, rows, scratch.get(padded * R * S::kLanes));
  const int64_t size = tile_size<S>(call);
  for (int64_t first = 0; first < call.tokens; first += size) {
    const int64_t count = tokens_of_tile(call.tokens, first / size, size);
    const int8_t* q = a.q + first * padded;
    const float* scale = a.scale + first * groups;
    const int32_t* correction = a.correction + first * groups;
    float* target = out + first * stride;
    if (w.bits == 8) {
      dot_tokens<S, kBytes, false, R>(count, w, rows, q, scale, correction, target, stride);
    } else if (unpacked) {
      dot_tokens<S, kUnpacked, zeros, R>(count, w, rows, q, scale, correction, target, stride);
    } else {
      dot_tokens<S, kPacked, zeros, R>(count, w, rows, q, scale, correction, target, stride);
    }
  }
}

// Rows of nonlinear levels.
template <class S, int R>
void level_rows(const LinearCall& call, const Activations& a, int64_t vector, Scratch& scratch, float* out,
                int64_t stride) {
  const Weights& w = call.weights;
  const int64_t padded = w.padded(), groups = w.groups(), spans = w.spans();
  Rows<R> rows = rows_at<S, R>(w, vector);
  const bool unpacked = unpacks<S>(call);
  if (unpacked) rows = unpack<S, true, R>(w, rows, scratch.get(padded * R * S::kLanes));
  const int64_t size = tile_size<S>(call);
  for (int64_t first = 0; first < call.tokens; first += size) {
    const int64_t count = tokens_of_tile(call.tokens, first / size, size);
    const int8_t* q = a.q + first * padded;
    const float* scale = a.scale + first * groups;
    const int32_t* correction = a.correction + first * spans;
    float* target = out + first * stride;
    if (unpacked) {
      level_tokens<S, kLevelBytes, R>(count, w, rows, q, scale, correction, target, stride);
    } else {
      level_tokens<S, kLevelNibbles, R>(count, w, rows, q, scale, correction, target, stride);
    }
  }
}

template <class S, int R>
void float_rows(const LinearCall& call, const Activations& a, int64_t vector, Scratch& scratch, float* out,
                int64_t stride) {
  if (call.tokens <= kFloatFew) {
    for (int r = 0; r < R; ++r) float_few<S>(call, a, vector + r, out + r * S::kLanes, stride);
    return;
  }
  const Weights& w = call.weights;
  const int64_t padded = w.padded();
  const Rows<R> rows = rows_at<S, R>(w, vector);
  float* panel = reinterpret_cast<float*>(scratch.get(kFloatPiece * R * S::kLanes * 4));
  for (int64_t t = 0; t < call.tokens; ++t) {
    for (int r = 0; r < R; ++r) {
      S::store(out + t * stride + r * S::kLanes, rows.bias[r] ? S::load(rows.bias[r]) : S::fzero());
    }
  }
  for (int64_t begin = 0; begin < padded; begin += kFloatPiece) {
    const int64_t end = begin + kFloatPiece < padded ? begin + kFloatPiece : padded;
    dequantize<S, R>(w, rows, begin, end, panel);
    for (int64_t first = 0; first < call.tokens; first += S::kTokens) {
      const int64_t count = tokens_of_tile(call.tokens, first / S::kTokens, S::kTokens);
      float_tokens<S, R>(count, panel, a.x + first * padded + begin * count, end - begin,
                         out + first * stride, stride);
    }
  }
}

template <class S, int R>
void some_rows(const LinearCall& call, const Activations& a, int64_t vector, float* out, int64_t stride) {
  static thread_local Scratch scratch;
  if (call.weight_only) return float_rows<S, R>(call, a, vector, scratch, out, stride);
  if (call.weights.span_scales) return level_rows<S, R>(call, a, vector, scratch, out, stride);
  if (call.weights.zeros) return dot_rows<S, true, R>(call, a, vector, scratch, out, stride);
  dot_rows<S, false, R>(call, a, vector, scratch, out, stride);
}

// R vectors of rows into y; the last ones may be wider than y and go through a buffer.
template <class S, int R>
void write_rows(const LinearCall& call, const Activations& a, int64_t vector) {
  static thread_local Scratch overhang;
  const int64_t first = vector * S::kLanes, width = R * S::kLanes;
  if (first >= call.weights.rows) return;
  if (first + width <= call.weights.rows) {
    return some_rows<S, R>(call, a, vector, call.y + first, call.y_stride);
  }
  float* buffer = reinterpret_cast<float*>(overhang.get(call.tokens * width * 4));
  some_rows<S, R>(call, a, vector, buffer, width);
  const size_t bytes = static_cast<size_t>(call.weights.rows - first) * 4;
  for (int64_t t = 0; t < call.tokens; ++t) {
    std::memcpy(call.y + t * call.y_stride + first, buffer + t * width, bytes);
  }
  overhang.trim();
}

template <class S, int R>
int64_t units_of(const LinearCall& call) {
  return (call.weights.blocks() * (kBlock / S::kLanes) + R - 1) / R;
}

// The rows of one unit: R vectors, fewer at the end.
template <class S, int R>
void write_unit(const LinearCall& call, const Activations& a, int64_t unit) {
  const int64_t vectors = call.weights.blocks() * (kBlock / S::kLanes), vector = unit * R;
  if (vector + R <= vectors) return write_rows<S, R>(call, a, vector);
  for (int64_t v = vector; v < vectors; ++v) write_rows<S, 1>(call, a, v);
}

// The rows of all calls, shared out together.
template <class S, int R>
void share_out(const LinearCall* calls, int64_t count, const Activations& a) {
  const LinearCall& one = calls[0];
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) units += units_of<S, R>(calls[i]);
  // A piece is worth a hand's while from about this many multiply-adds.
  const int64_t work = one.tokens * one.weights.padded() * R * S::kLanes;
  for_pieces(one.threads, units, 1 + (int64_t{1} << 17) / work, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // unit of the call
    for (int64_t i = 0; i < count; ++i) {
      const int64_t own = units_of<S, R>(calls[i]);
      const int64_t from = begin > first ? begin - first : 0;
      const int64_t to = end - first < own ? end - first : own;
      for (int64_t unit = from; unit < to; ++unit) write_unit<S, R>(calls[i], a, unit);
      first += own;
    }
  });
}

template <class S, class = void>
constexpr bool kHasTiles = false;
template <class S>
constexpr bool kHasTiles<S, std::enable_if_t<(S::kMatrixFrom > 0)>> = true;

// Whether tiles are faster: for a few tens of tokens, more where weights are two bytes, and never for groups that
// fill half of a tile.
template <class S>
bool takes_tiles(const LinearCall& call) {
  const int64_t from = S::kMatrixFrom * (call.weights.span_scales != nullptr ? 2 : 1);
  return call.tokens >= from && call.weights.group >= kTileInputs && !call.weight_only;
}

// Some calls with the same activations, of weights that are packed alike: those are rounded once, and
// the rows of all weights are shared out together.
template <class S>
void linear(const LinearCall* calls, int64_t count) {
  static thread_local Scratch scratch;
  if (calls[0].tokens == 0) return;
  if constexpr (kHasTiles<S>) {
    if (takes_tiles<S>(calls[0])) return matrix<S>(calls, count);
  }
  const Activations a = prepare<S>(calls[0], scratch);
  // One block of rows at a time: one stream from memory is faster than two.
  calls[0].tokens <= S::kFew ? share_out<S, kBlock / S::kLanes>(calls, count, a)
                             : share_out<S, S::kVectors>(calls, count, a);
  scratch.trim();
}

}  // namespace
}  // namespace lapilli
