// Packed weights times many tokens by tiles of bytes, where an instruction set has them (isa_amx.h).
//
//   activations  rounded as for the other loops: q[tile of 16 tokens][group][64 inputs][token][input]
//   a pair       of tiles of weights: two blocks of rows, or one of nonlinear levels as two bytes,
//                level * scale of the span = 256 * high + low
//   a piece      some groups of inputs of a pair as bytes in the cache, met by every tile of tokens
//   a group      sums of integers -> scaled by weight and token onto sums of floats
//
// Groups are padded with zeros to 64 inputs. Sums of a group are exact, and their scales are those of tile.h in
// the same order; only nonlinear levels, which are summed by group and not by span, differ by roundings.
#pragma once

#include "activations.h"

namespace lapilli {
namespace {

constexpr int64_t kTile = 16;           // tokens of a tile
constexpr int64_t kTileInputs = 64;     // inputs of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kMatrixPiece = 512;   // inputs of a piece, whole groups

enum MatrixKind { kMatrixBytes, kMatrixNibbles, kMatrixZeros, kMatrixLevels };

inline int64_t group_inputs(const Weights& w, int64_t group) {
  const int64_t left = w.padded() - group * w.group;
  return left < w.group ? left : w.group;
}
inline int64_t group_steps(const Weights& w) { return (w.group + kTileInputs - 1) / kTileInputs; }

// One token of a group, padded with zeros to whole tiles.
template <class S>
void put_group(const Weights& w, const float* row, int64_t group, int8_t* q, float* scale) {
  alignas(64) float buffer[kMaxGroup] = {};
  alignas(64) int8_t rounded[kMaxGroup] = {};
  const int64_t begin = group * w.group, count = group_inputs(w, group);
  const int64_t valid = w.inputs - begin < count ? w.inputs - begin : count;
  const float* source = row + begin;
  if (valid < count) {
    std::memcpy(buffer, source, static_cast<size_t>(valid) * 4);
    source = buffer;
  }
  quantize_group<S>(source, count, rounded, scale);
  for (int64_t s = 0; s < group_steps(w); ++s) std::memcpy(q + s * kTileBytes, rounded + s * kTileInputs, kTileInputs);
}

inline int32_t total_of_group(const Weights& w, const int8_t* q) {
  int32_t sum = 0;
  for (int64_t s = 0; s < group_steps(w); ++s) sum += total(q + s * kTileBytes, kTileInputs);
  return sum;
}

// Activations of a call, `tiles` rounded up to a pair: tokens beyond the last one are zeros.
template <class S>
Activations prepare_tiles(const LinearCall& call, int64_t tiles, int32_t bias, Scratch& scratch) {
  const Weights& w = call.weights;
  const int64_t groups = w.groups(), size = group_steps(w) * kTileBytes;
  Activations out{};
  uint8_t* memory = scratch.get(tiles * groups * (size + 2 * kTile * 4));
  out.q = reinterpret_cast<int8_t*>(memory);
  out.scale = reinterpret_cast<float*>(memory + tiles * groups * size);
  out.correction = reinterpret_cast<int32_t*>(out.scale + tiles * groups * kTile);
  for_pieces(call.threads, tiles * kTile, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t tile = token / kTile, t = token % kTile;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = tile * groups + g;
        int8_t* q = out.q + at * size + t * kTileInputs;
        if (token < call.tokens) {
          put_group<S>(w, call.x + token * call.x_stride, g, q, out.scale + at * kTile + t);
        } else {
          for (int64_t s = 0; s < group_steps(w); ++s) std::memset(q + s * kTileBytes, 0, kTileInputs);
          out.scale[at * kTile + t] = 0.0f;
        }
        out.correction[at * kTile + t] = -bias * total_of_group(w, q);
      }
    }
  });
  return out;
}

// `count` inputs of one block of rows from group `group` as bytes; nonlinear levels into both tiles.
template <class S, MatrixKind kind>
void unpack_group(const Weights& w, int64_t block, int64_t group, uint8_t* low, uint8_t* high) {
  const int64_t begin = group * w.group, count = group_inputs(w, group);
  const uint8_t* data = w.data + block * w.block_bytes() + begin * kBlock * w.bits / 8;
  typename S::Span span{};
  for (int64_t k = 0; k < count; k += 8) {
    typename S::W first, second;
    if (kind == kMatrixBytes) {
      first = S::bytes(data + k * 16), second = S::bytes(data + k * 16 + 64);
    } else {
      S::nibbles(data + k * 8, first, second);
    }
    if (kind == kMatrixLevels) {
      if (k % kSpan == 0) span = S::span(w.span_scales + (block * w.spans() + (begin + k) / kSpan) * kBlock);
      S::store_scaled_levels(first, span, low + k * 16, high + k * 16);
      S::store_scaled_levels(second, span, low + k * 16 + 64, high + k * 16 + 64);
    } else {
      S::store_bytes(low + k * 16, first);
      S::store_bytes(low + k * 16 + 64, second);
    }
  }
  const int64_t used = count * kBlock, size = group_steps(w) * kTileBytes;
  std::memset(low + used, 0, static_cast<size_t>(size - used));
  if (kind == kMatrixLevels) std::memset(high + used, 0, static_cast<size_t>(size - used));
}

// Sums of a group of one tile of tokens, scaled, onto floats [weight tile][token][row], the tiles `stride` apart.
template <class S, MatrixKind kind>
void add_group(const Weights& w, int64_t block, int64_t group, const int32_t* sums, const float* scale,
               const int32_t* correction, float* out, int64_t stride) {
  using F = typename S::F;
  using I = typename S::I;
  if (kind == kMatrixLevels) {
    for (int64_t t = 0; t < kTile; ++t) {
      const I sum = S::joined(S::iload(sums + 256 + t * kBlock), S::iload(sums + t * kBlock));
      float* target = out + t * kBlock;
      S::store(target, S::fma(S::to_float(sum), S::fset(scale[t]), S::load(target)));
    }
    return;
  }
  for (int64_t i = 0; i < 2 && block + i < w.blocks(); ++i) {
    const int64_t fact = ((block + i) * w.groups() + group) * kBlock;
    const F factor = kind == kMatrixBytes ? S::fset(1.0f) : S::half(w.half_scales + fact);
    const I zeros = kind == kMatrixZeros ? S::widen(w.zeros + fact) : S::izero();
    for (int64_t t = 0; t < kTile; ++t) {
      const I start = S::iset(correction[t]);
      const I sum = S::iadd(S::iload(sums + i * 256 + t * kBlock), kind == kMatrixZeros ? S::imul(start, zeros) : start);
      const F token = S::fset(scale[t]), both = kind == kMatrixBytes ? token : S::mul(factor, token);
      float* target = out + i * stride + t * kBlock;
      S::store(target, S::fma(S::to_float(sum), both, S::load(target)));
    }
  }
}

// Sums of blocks begin..end with the scales of rows and their bias into y.
template <class S>
void write_blocks(const LinearCall& call, int64_t begin, int64_t end, const float* from, int64_t stride) {
  using F = typename S::F;
  const Weights& w = call.weights;
  alignas(64) float last[kBlock];
  for (int64_t t = 0; t < call.tokens; ++t) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = w.rows - first < kBlock ? w.rows - first : kBlock;
      const F bias = w.bias != nullptr ? S::load(w.bias + first) : S::fzero();
      const F factor = w.row_scales != nullptr ? S::load(w.row_scales + first) : S::fset(1.0f);
      float* target = call.y + t * call.y_stride + first;
      const F sum = S::load(from + (block - begin) * stride + t * kBlock);
      S::store(count == kBlock ? target : last, S::fma(sum, factor, bias));
      if (count < kBlock) std::memcpy(target, last, static_cast<size_t>(count) * 4);
    }
  }
}

// Blocks of rows of a piece of work: written side by side, since every token's rows lie on another page.
constexpr int64_t kUnitBlocks = 4;

template <MatrixKind kind>
constexpr int64_t kPairBlocks = kind == kMatrixLevels ? 1 : 2;  // in two tiles of weights

// Groups first..last of the blocks in a pair of tiles as bytes.
template <class S, MatrixKind kind>
void unpack_piece(const Weights& w, int64_t block, int64_t first, int64_t last, uint8_t* low, uint8_t* high) {
  const int64_t size = group_steps(w) * kTileBytes;
  for (int64_t g = first; g < last; ++g, low += size, high += size) {
    unpack_group<S, kind>(w, block, g, low, high);
    if (kind == kMatrixLevels) continue;
    if (block + 1 < w.blocks()) {
      unpack_group<S, kind>(w, block + 1, g, high, nullptr);
    } else {
      std::memset(high, 0, static_cast<size_t>(size));
    }
  }
}

// Two tiles of tokens times groups first..last, onto floats. The products of a group are begun before the sums of
// the one before are scaled: tiles and vectors work at the same time.
template <class S, MatrixKind kind>
void add_piece(const Weights& w, const Activations& a, int64_t tile, int64_t block, int64_t first, int64_t last,
               const uint8_t* low, const uint8_t* high, float* out, int64_t stride) {
  const int64_t groups = w.groups(), size = group_steps(w) * kTileBytes;
  alignas(64) int32_t sums[2][4 * 256];
  const auto multiply = [&](int64_t g) {
    const int64_t at = (g - first) * size, one = tile * groups + g, two = one + groups;
    const int64_t steps = (group_inputs(w, g) + kTileInputs - 1) / kTileInputs;
    S::template multiply<kind == kMatrixLevels>(a.q + one * size, a.q + two * size, low + at, high + at, steps,
                                                sums[g % 2]);
  };
  multiply(first);
  for (int64_t g = first; g < last; ++g) {
    if (g + 1 < last) multiply(g + 1);
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t facts = ((tile + i) * groups + g) * kTile;
      add_group<S, kind>(w, block, g, sums[g % 2] + i * 512, a.scale + facts, a.correction + facts,
                         out + i * kTile * kBlock, stride);
    }
  }
}

// Some blocks of rows, for all tokens.
template <class S, MatrixKind kind>
void matrix_unit(const LinearCall& call, const Activations& a, int64_t tiles, int64_t begin, int64_t end) {
  static thread_local Scratch memory;
  const Weights& w = call.weights;
  const int64_t groups = w.groups(), size = group_steps(w) * kTileBytes, stride = tiles * kTile * kBlock;
  const int64_t some = kMatrixPiece > w.group ? kMatrixPiece / w.group : 1;  // groups of a piece
  const int64_t bytes = kUnitBlocks * stride * 4;
  float* out = reinterpret_cast<float*>(memory.get(bytes + 2 * some * size));
  uint8_t* low = reinterpret_cast<uint8_t*>(out) + bytes;
  uint8_t* high = low + some * size;
  std::memset(out, 0, static_cast<size_t>(bytes));
  for (int64_t block = begin; block < end; block += kPairBlocks<kind>) {
    for (int64_t first = 0; first < groups; first += some) {
      const int64_t last = first + some < groups ? first + some : groups;
      unpack_piece<S, kind>(w, block, first, last, low, high);
      for (int64_t tile = 0; tile < tiles; tile += 2) {
        float* target = out + (block - begin) * stride + tile * kTile * kBlock;
        add_piece<S, kind>(w, a, tile, block, first, last, low, high, target, stride);
      }
    }
  }
  write_blocks<S>(call, begin, end, out, stride);
  memory.trim();
}

template <class S, MatrixKind kind>
void share_units(const LinearCall* calls, int64_t count, const Activations& a, int64_t tiles) {
  const auto units_of = [](const LinearCall& call) { return (call.weights.blocks() + kUnitBlocks - 1) / kUnitBlocks; };
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) units += units_of(calls[i]);
  for_pieces(calls[0].threads, units, 1, [&](int64_t begin, int64_t end) {
    S::begin_tiles();
    int64_t first = 0;  // unit of the call
    for (int64_t i = 0; i < count; ++i) {
      const int64_t own = units_of(calls[i]), blocks = calls[i].weights.blocks();
      const int64_t from = begin > first ? begin - first : 0, to = end - first < own ? end - first : own;
      for (int64_t unit = from; unit < to; ++unit) {
        const int64_t block = unit * kUnitBlocks, past = block + kUnitBlocks;
        matrix_unit<S, kind>(calls[i], a, tiles, block, past < blocks ? past : blocks);
      }
      first += own;
    }
    S::end_tiles();
  });
}

// As `linear`, for many tokens that are rounded.
template <class S>
void matrix(const LinearCall* calls, int64_t count) {
  static thread_local Scratch scratch;
  const Weights& w = calls[0].weights;
  const int64_t tiles = (calls[0].tokens + 2 * kTile - 1) / (2 * kTile) * 2;
  const int32_t bias = w.bits == 8 ? S::kByteBias : (w.zeros != nullptr ? 1 : 8);
  const Activations a = prepare_tiles<S>(calls[0], tiles, bias, scratch);
  if (w.span_scales != nullptr) {
    share_units<S, kMatrixLevels>(calls, count, a, tiles);
  } else if (w.bits == 8) {
    share_units<S, kMatrixBytes>(calls, count, a, tiles);
  } else if (w.zeros != nullptr) {
    share_units<S, kMatrixZeros>(calls, count, a, tiles);
  } else {
    share_units<S, kMatrixNibbles>(calls, count, a, tiles);
  }
  scratch.trim();
}

}  // namespace
}  // namespace lapilli
