// Activations in the order in which the tiles read them: the rows of a tile interleaved, so that
// the rows of a tile never alias in the cache.
//
//   quantized   q[tile][input / 4][token of the tile][input % 4], scale and correction [tile][group][token]
//               q = round(x * 127 / max|x|) over a group;  correction = -sum(q) * what zero is stored as
//               nonlinear levels: correction [tile][span][token]
//   float       x[tile][input][token of the tile]
#pragma once

#include "abi.h"
#include "pool.h"

namespace lapilli {
namespace {

struct Activations {
  int8_t* q;
  float* scale;
  int32_t* correction;
  float* x;
};

constexpr int64_t kMaxGroup = 128;
constexpr float kSmallest = 1e-30f;  // below this a group counts as zeros: 127 / max stays finite

template <class S>
void quantize_group(const float* x, int64_t count, int8_t* q, float* scale) {
  typename S::I most = S::izero();
  for (int64_t i = 0; i < count; i += S::kLanes) most = S::max_bits(most, S::load(x + i));
  const int32_t bits = S::reduce_max(most);
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool empty = largest < kSmallest;
  const typename S::F factor = S::fset(empty ? 0.0f : 127.0f / largest);
  for (int64_t i = 0; i < count; i += S::kLanes) {
    S::store_rounded(q + i, S::mul(S::load(x + i), factor));
  }
  *scale = empty ? 0.0f : largest / 127.0f;
}

inline int32_t total(const int8_t* q, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += q[i];
  return sum;
}

constexpr int64_t kUnpackFrom = 4;  // tiles of tokens; unpacking nibbles pays from here

// Whether nibbles are unpacked once for all tokens.
template <class S>
bool unpacks(const LinearCall& call) {
  return call.weights.bits == 4 && call.tokens >= kUnpackFrom * S::kTokens;
}

// What has a correction of its own: a span of nonlinear levels, or a group.
inline int64_t corrected_inputs(const Weights& w) { return w.span_scales != nullptr ? kSpan : w.group; }
inline int64_t corrections(const Weights& w) { return w.span_scales != nullptr ? w.spans() : w.groups(); }

template <class S>
void quantize_tile(const LinearCall& call, int64_t first, int64_t tokens, int32_t bias, const Activations& out) {
  const Weights& w = call.weights;
  const int64_t padded = w.padded(), groups = w.groups(), unit = corrected_inputs(w), units = corrections(w);
  alignas(64) float buffer[kMaxGroup];
  alignas(64) int8_t q[kMaxGroup];
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = call.x + (first + t) * call.x_stride;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * w.group;
      const int64_t count = padded - begin < w.group ? padded - begin : w.group;
      const int64_t valid = w.inputs - begin < count ? w.inputs - begin : count;
      const float* source = row + begin;
      if (valid < count) {
        std::memcpy(buffer, source, static_cast<size_t>(valid) * 4);
        std::memset(buffer + valid, 0, static_cast<size_t>(count - valid) * 4);
        source = buffer;
      }
      quantize_group<S>(source, count, q, out.scale + (first * groups + g * tokens + t));
      for (int64_t i = 0; i < count; i += unit) {
        const int64_t size = count - i < unit ? count - i : unit;
        out.correction[first * units + (begin + i) / unit * tokens + t] = -bias * total(q + i, size);
      }
      int8_t* target = out.q + first * padded + (begin * tokens + t * 4);
      for (int64_t i = 0; i < count; i += 4) std::memcpy(target + i * tokens, q + i, 4);
    }
  }
}

template <class S>
void interleave_tile(const LinearCall& call, int64_t first, int64_t tokens, const Activations& out) {
  const int64_t inputs = call.weights.inputs, padded = call.weights.padded();
  float* target = out.x + first * padded;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = call.x + (first + t) * call.x_stride;
    for (int64_t k = 0; k < inputs; ++k) target[k * tokens + t] = row[k];
    for (int64_t k = inputs; k < padded; ++k) target[k * tokens + t] = 0.0f;
  }
}

// Tokens of a whole tile: few, rounded, go together, since their tiles have one block of rows (linear.h).
template <class S>
int64_t tile_size(const LinearCall& call) {
  return !call.weight_only && call.tokens <= S::kFew ? S::kFew : S::kTokens;
}

inline int64_t tokens_of_tile(int64_t tokens, int64_t tile, int64_t size) {
  const int64_t left = tokens - tile * size;
  return left < size ? left : size;
}

// All activations of a call, in memory of the calling thread.
template <class S>
Activations prepare(const LinearCall& call, Scratch& scratch) {
  const Weights& w = call.weights;
  const int64_t padded = w.padded(), groups = w.groups(), tokens = call.tokens;
  const int64_t size = tile_size<S>(call), tiles = (tokens + size - 1) / size;
  const int64_t step = 1 + (1 << 14) / (padded * size);  // pieces worth handing out
  Activations out{};
  if (call.weight_only) {
    out.x = reinterpret_cast<float*>(scratch.get(tokens * padded * 4));
    for_pieces(call.threads, tiles, step, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        interleave_tile<S>(call, i * size, tokens_of_tile(tokens, i, size), out);
      }
    });
    return out;
  }
  const auto lines = [&](int64_t units) { return (tokens * units * 4 + 63) / 64 * 64; };
  const int64_t scales = lines(groups), sums = lines(corrections(w));
  uint8_t* memory = scratch.get(tokens * padded + scales + sums);
  out.scale = reinterpret_cast<float*>(memory);
  out.correction = reinterpret_cast<int32_t*>(memory + scales);
  out.q = reinterpret_cast<int8_t*>(memory + scales + sums);
  const bool bytes = w.bits == 8 || w.span_scales != nullptr;
  const int32_t bias = bytes ? S::kByteBias : (w.zeros != nullptr ? 1 : 8);
  for_pieces(call.threads, tiles, step, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      quantize_tile<S>(call, i * size, tokens_of_tile(tokens, i, size), bias, out);
    }
  });
  return out;
}

}  // namespace
}  // namespace lapilli
