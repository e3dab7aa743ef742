// A layer of a vision transformer in one call: norms, products, attention, activation and residuals in the
// order of modality/image/image.py, for every position of some tiles.
//
//   Met       what a product meets: rows in units of four bytes, one float, two bfloat16 or four int8, the
//             rows of a tile of tokens interleaved as in activations.h
//   product   a piece of the output rows, their weights in the cache, against every tile; what comes out of
//             a tile goes through the next operation before it leaves the cache
//
// The activation between the products of the MLP is written as the second one meets it.
#pragma once

#include "attention_pairs.h"
#include "dense.h"
#include "linear.h"
#include "prefill.h"

namespace lapilli {
namespace {

constexpr int64_t kPiece = 128;    // most output rows that are met together: whole groups of int8
constexpr int64_t kAtOnce = 1024;  // positions: more would leave the caches, and take more memory

// Memory of a call, cut from one piece.
struct Room {
  uint8_t* at;
  template <class T>
  T* take(int64_t count) {
    uint8_t* from = at;
    at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(from);
  }
};

struct Met {
  int64_t kind;  // of the numbers in a unit
  int64_t tokens;
  int64_t padded;       // inputs
  int64_t group;        // of int8
  uint32_t* units;      // [tile][unit][token of the tile]
  float* scale;         // of int8, [tile][group][token of the tile]
  int32_t* correction;  // likewise

  int64_t per() const { return kind == kInt8 ? 4 : kind == kBfloat16 ? 2 : 1; }
  int64_t units_of_row() const { return padded / per(); }
  int64_t groups() const { return (padded + group - 1) / group; }
};

// Output rows of a piece of work: as many as leave every thread some pieces.
inline int64_t piece_rows(int64_t rows, int64_t threads) {
  int64_t piece = kPiece;
  while (piece > 32 && rows < piece * threads * 4) piece /= 2;
  return piece;
}

// Rows that a product meets, in no memory yet.
inline Met met_of(const Product& p, int64_t kind, int64_t tokens) {
  Met met{};
  met.kind = kind;
  met.tokens = tokens;
  met.padded = (p.inputs + kChunk - 1) / kChunk * kChunk;
  met.group = kind == kInt8 ? p.packed->group : kMaxGroup;
  return met;
}

inline int64_t bytes_of(const Met& met) {
  const int64_t facts = met.kind == kInt8 ? 8 * met.tokens * met.groups() + 128 : 0;
  return 4 * met.tokens * met.units_of_row() + facts + 64;
}

inline void place(Met& met, Room room) {
  met.units = room.take<uint32_t>(met.tokens * met.units_of_row());
  if (met.kind != kInt8) return;
  met.scale = room.take<float>(met.tokens * met.groups());
  met.correction = room.take<int32_t>(met.tokens * met.groups());
}

// Rows of a tile, `stride` floats apart, as bytes of their groups; the same numbers as quantize_group
// (activations.h), the rows side by side: one alone would wait for its largest number, then for its sum.
template <class S>
void round_rows(const Met& met, int64_t facts, int64_t tokens, const float* values, int64_t stride, int64_t count,
                uint32_t (*units)[kPiece]) {
  float factor[S::kTokens];
  for (int64_t at = 0, group = facts; at < count; at += met.group, group += tokens) {
    const int64_t end = count - at < met.group ? count : at + met.group;
    for (int64_t t = 0; t < tokens; ++t) {
      typename S::I most = S::izero();
      for (int64_t i = at; i < end; i += S::kLanes) most = S::max_bits(most, S::load(values + t * stride + i));
      const int32_t bits = S::reduce_max(most);
      float largest;
      std::memcpy(&largest, &bits, 4);
      const bool empty = largest < kSmallest;
      factor[t] = empty ? 0.0f : 127.0f / largest;
      met.scale[group + t] = empty ? 0.0f : largest / 127.0f;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      typename S::I sum = S::izero();
      for (int64_t i = at; i < end; i += S::kLanes) {
        const typename S::F v = S::mul(S::load(values + t * stride + i), S::fset(factor[t]));
        sum = S::iadd(sum, S::nearest(v));
        S::store_rounded(reinterpret_cast<int8_t*>(units[t]) + i, v);
      }
      met.correction[group + t] = -S::kByteBias * static_cast<int32_t>(S::sum(S::to_float(sum)));
    }
  }
}

// Inputs begin..begin + count of the tokens of a tile, at most kPiece: whole groups, or the end of a row.
template <class S>
void put(const Met& met, int64_t first, int64_t tokens, const float* values, int64_t stride, int64_t begin,
         int64_t count) {
  uint32_t* target = met.units + first * met.units_of_row() + begin / met.per() * tokens;
  if (met.kind == kFloat32) {
    for (int64_t u = 0; u < count; ++u) {
      for (int64_t t = 0; t < tokens; ++t) std::memcpy(target + u * tokens + t, values + t * stride + u, 4);
    }
    return;
  }
  alignas(64) uint32_t units[S::kTokens][kPiece];
  if (met.kind == kInt8) {
    round_rows<S>(met, first * met.groups() + begin / met.group * tokens, tokens, values, stride, count, units);
  } else {
    for (int64_t t = 0; t < tokens; ++t) to_pairs<S>(values + t * stride, count, units[t]);
  }
  for (int64_t u = 0; u < count / met.per(); ++u) {
    for (int64_t t = 0; t < tokens; ++t) target[u * tokens + t] = units[t][u];
  }
}

// Every row as `row(token, values)` makes it, in memory of `padded` floats whose end is zero.
template <class S, class Row>
void put_rows(const Met& met, int64_t threads, const Row& row) {
  const int64_t tiles = (met.tokens + S::kTokens - 1) / S::kTokens;
  const int64_t step = 1 + (1 << 14) / (met.padded * S::kTokens);
  for_pieces(threads, tiles, step, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const size_t bytes = static_cast<size_t>(S::kTokens * met.padded * 4);
    float* values = reinterpret_cast<float*>(scratch.get(static_cast<int64_t>(bytes)));
    std::memset(values, 0, bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * S::kTokens, count = tokens_of_tile(met.tokens, i, S::kTokens);
      for (int64_t t = 0; t < count; ++t) row(first + t, values + t * met.padded);
      for (int64_t at = 0; at < met.padded; at += kPiece) {
        put<S>(met, first, count, values + at, met.padded, at, met.padded - at < kPiece ? met.padded - at : kPiece);
      }
    }
  });
}

// Weights of R vectors of output rows in units, [unit][vector][lane].
template <class S, int R>
void pack_rows(const Product& p, int64_t kind, int64_t vector, uint32_t* panel) {
  constexpr int64_t wide = R * S::kLanes, block = 16;
  const int64_t units = kind == kBfloat16 ? p.inputs / 2 : p.inputs, bytes = p.stride * cache_bytes(p.kind);
  const char* from = static_cast<const char*>(p.plain) + vector * S::kLanes * bytes;
  for (int64_t begin = 0; begin < units; begin += block) {
    const int64_t end = begin + block < units ? begin + block : units;
    if constexpr (kHasPairs<S>) {
      if (end - begin == block && kind == p.kind) {
        for (int r = 0; r < R; ++r) {
          S::transpose(from + r * S::kLanes * bytes + begin * 4, bytes, panel + begin * wide + r * S::kLanes, wide);
        }
        continue;
      }
    }
    for (int64_t row = 0; row < wide; ++row) {
      for (int64_t u = begin; u < end; ++u) {
        if (kind == p.kind) {
          std::memcpy(panel + u * wide + row, from + row * bytes + u * 4, 4);
        } else {  // bfloat16 where there are no products of pairs
          const float wider = plain<kBfloat16>(from + row * bytes, u);
          std::memcpy(panel + u * wide + row, &wider, 4);
        }
      }
    }
  }
}

// A tile against R vectors of output rows; `panel` holds the weights unless they are packed.
template <class S, int R>
void meet_tile(const Product& p, const Met& met, int64_t vector, const uint32_t* panel, int64_t first, int64_t count,
               float* out, int64_t stride) {
  const uint32_t* units = met.units + first * met.units_of_row();
  if (met.kind == kInt8) {
    const Rows<R> rows = rows_at<S, R>(*p.packed, vector);
    const int64_t at = first * met.groups();
    return dot_tokens<S, kBytes, false, R>(count, *p.packed, rows, reinterpret_cast<const int8_t*>(units),
                                           met.scale + at, met.correction + at, out, stride);
  }
  const float* bias = p.bias ? p.bias + vector * S::kLanes : nullptr;
  for (int64_t t = 0; t < count; ++t) {
    for (int r = 0; r < R; ++r) {
      S::store(out + t * stride + r * S::kLanes, bias ? S::load(bias + r * S::kLanes) : S::fzero());
    }
  }
  if constexpr (kHasPairs<S>) {
    if (met.kind == kBfloat16) return pair_tokens<S, R>(count, panel, units, p.inputs / 2, out, stride);
  }
  float_tokens<S, R>(count, reinterpret_cast<const float*>(panel), reinterpret_cast<const float*>(units), p.inputs,
                     out, stride);
}

// Rows of a piece, `vectors` of them from `vector` on; then(first token, tokens, first row, rows, values).
template <class S, class Then>
void meet_piece(const Product& p, const Met& met, int64_t vector, int64_t vectors, const Then& then) {
  constexpr int R = S::kVectors;
  static thread_local Scratch scratch;
  alignas(64) float out[S::kTokens * kPiece];
  const int64_t units = met.units_of_row(), width = vectors * S::kLanes;
  uint32_t* panels = nullptr;
  if (met.kind != kInt8) {
    panels = reinterpret_cast<uint32_t*>(scratch.get(units * width * 4));
    int64_t v = 0;
    for (; v + R <= vectors; v += R) pack_rows<S, R>(p, met.kind, vector + v, panels + v * S::kLanes * units);
    for (; v < vectors; ++v) pack_rows<S, 1>(p, met.kind, vector + v, panels + v * S::kLanes * units);
  }
  for (int64_t first = 0; first < met.tokens; first += S::kTokens) {
    const int64_t count = tokens_of_tile(met.tokens, first / S::kTokens, S::kTokens);
    int64_t v = 0;
    for (; v + R <= vectors; v += R) {
      meet_tile<S, R>(p, met, vector + v, panels + v * S::kLanes * units, first, count, out + v * S::kLanes, width);
    }
    for (; v < vectors; ++v) {
      meet_tile<S, 1>(p, met, vector + v, panels + v * S::kLanes * units, first, count, out + v * S::kLanes, width);
    }
    then(first, count, vector * S::kLanes, width, out);
  }
  scratch.trim();
}

// Some products of the same rows, shared out in pieces of `rows` output rows; then(product, ...) as above.
template <class S, class Then>
void meet(const Product* const* products, int64_t count, const Met& met, int64_t rows, int64_t threads,
          const Then& then) {
  int64_t all = 0;
  for (int64_t i = 0; i < count; ++i) all += (products[i]->rows + rows - 1) / rows;
  for_pieces(threads, all, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      int64_t i = 0, row = piece * rows;
      for (; row >= products[i]->rows; ++i) row -= (products[i]->rows + rows - 1) / rows * rows;
      const int64_t here = products[i]->rows - row < rows ? products[i]->rows - row : rows;
      meet_piece<S>(*products[i], met, row / S::kLanes, here / S::kLanes,
                    [&](int64_t first, int64_t tokens, int64_t at, int64_t width, float* values) {
                      then(i, first, tokens, at, width, values);
                    });
    }
  });
}

// A row to a mean of zero and a variance of one, times the weight, plus the bias.
template <class S>
void layer_norm(const float* x, const float* weight, const float* bias, int64_t width, float eps, float* y) {
  using F = typename S::F;
  F sum = S::fzero(), squares = S::fzero();
  for (int64_t i = 0; i < width; i += S::kLanes) sum = S::add(sum, S::load(x + i));
  const F mean = S::fset(S::sum(sum) / static_cast<float>(width));
  for (int64_t i = 0; i < width; i += S::kLanes) {
    const F off = S::sub(S::load(x + i), mean);
    squares = S::fma(off, off, squares);
  }
  const F factor = S::fset(1.0f / std::sqrt(S::sum(squares) / static_cast<float>(width) + eps));
  for (int64_t i = 0; i < width; i += S::kLanes) {
    const F off = S::mul(S::sub(S::load(x + i), mean), factor);
    S::store(y + i, S::fma(off, S::load(weight + i), S::load(bias + i)));
  }
}

// x / (1 + 2^power); roughly, where it is rounded to pairs or bytes afterwards.
template <class S, bool rough>
typename S::F gate(typename S::F x, typename S::F power) {
  using F = typename S::F;
  if constexpr (rough && kHasPairs<S>) {
    return S::mul(x, S::rough_inverse(S::add(S::fset(1.0f), S::rough_power(power))));
  }
  const F below = exponential<S>(S::mul(power, S::fset(1.0f / kLog2e)));
  return S::div(x, S::add(S::fset(1.0f), below));
}

// x / (1 + e^-1.702 x); x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3); x / 2 (1 + erf(x / sqrt 2)).
template <class S, bool rough>
typename S::F activate(typename S::F x, int64_t activation) {
  using F = typename S::F;
  if (activation == kQuickGelu) return gate<S, rough>(x, S::mul(x, S::fset(-1.702f * kLog2e)));
  if (activation == kGeluTanh) {
    constexpr float kLinear = -2 * 0.7978845608028654f * kLog2e, kCubic = 0.044715f * kLinear;
    return gate<S, rough>(x, S::mul(x, S::fma(S::mul(x, x), S::fset(kCubic), S::fset(kLinear))));
  }
  // Source: Abramowitz and Stegun 7.1.26, within 1.5e-7.
  const F one = S::fset(1.0f), size = S::max(x, S::sub(S::fzero(), x)), z = S::mul(size, S::fset(0.70710678f));
  const F t = S::div(one, S::fma(z, S::fset(0.3275911f), one));
  F sum = S::fset(1.061405429f);
  sum = S::fma(sum, t, S::fset(-1.453152027f));
  sum = S::fma(sum, t, S::fset(1.421413741f));
  sum = S::fma(sum, t, S::fset(-0.284496736f));
  sum = S::fma(sum, t, S::fset(0.254829592f));
  const F rest = S::mul(S::mul(sum, t), exponential<S>(S::mul(S::sub(S::fzero(), z), z)));  // 1 - erf |z|
  // x / 2 + |x| / 2 (1 - rest): the same on both sides of zero.
  return S::fma(S::mul(size, S::fset(0.5f)), S::sub(one, rest), S::mul(x, S::fset(0.5f)));
}

template <class S, bool rough>
void activate_all(float* x, int64_t count, int64_t activation) {
  for (int64_t i = 0; i < count; i += S::kLanes) S::store(x + i, activate<S, rough>(S::load(x + i), activation));
}

// Queries, keys and values of a layer, and what attention makes of them; all [token, head, width].
struct Mixing {
  float* plain;     // all three, one after the other
  uint16_t* pairs;  // likewise, the queries scaled, where attention is made of pairs; else null
  int64_t size;     // of one of the three, with what is read behind the end of pairs
  float* seen;
};

// Outputs at..at + width of product i (q, k, v) for the tokens of a tile.
template <class S>
void keep(const TowerCall& call, const Mixing& to, int64_t i, int64_t first, int64_t count, int64_t at, int64_t width,
          float* values) {
  const int64_t row = call.heads * call.width;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t place = i * to.size + (first + t) * row + at;
    float* from = values + t * width;
    if (to.pairs == nullptr) {
      std::memcpy(to.plain + place, from, static_cast<size_t>(width) * 4);
      continue;
    }
    if (i == 0) {
      const typename S::F scale = S::fset(static_cast<float>(call.scale));
      for (int64_t j = 0; j < width; j += S::kLanes) S::store(from + j, S::mul(S::load(from + j), scale));
    }
    to_pairs<S>(from, width, reinterpret_cast<uint32_t*>(to.pairs + place));
  }
}

template <class S>
void attend_tiles(const TowerCall& call, const Mixing& at) {
  const int64_t width = call.width, row = call.heads * width, tile = call.positions * row, size = at.size;
  if constexpr (kHasPairs<S>) {
    if (at.pairs != nullptr) {
      return attend_pairs<S>({at.pairs, at.pairs + size, at.pairs + 2 * size, at.seen, call.tiles, call.positions,
                              call.heads, width, call.threads});
    }
  }
  PrefillCall attend{};
  attend.q = at.plain;
  attend.keys = at.plain + size;
  attend.values = at.plain + 2 * size;
  attend.out = at.seen;
  attend.batch = call.tiles;
  attend.heads = attend.kv_heads = call.heads;
  attend.queries = attend.positions = call.positions;
  attend.width = width;
  attend.q_row = attend.k_row = attend.v_row = attend.out_row = tile;
  attend.q_head = attend.k_head = attend.v_head = attend.out_head = width;
  attend.q_position = attend.k_position = attend.v_position = attend.out_position = row;
  attend.threads = call.threads;
  attend.scale = call.scale;
  prefill<S>(attend);
}

// What the operations of a layer hand to each other. Rows of norms and of attention share their memory, as
// do the needs of attention and those of the MLP.
struct Handed {
  Met normed;
  Met seen;
  Met active;
  Mixing mixing;
};

template <class S>
Handed hand(const TowerCall& call, Scratch& scratch) {
  const int64_t kind = call.kind == kBfloat16 && !kHasPairs<S> ? int64_t{kFloat32} : call.kind;
  const int64_t tokens = call.tiles * call.positions, row = call.heads * call.width;
  const bool pairs = kHasPairs<S> && kind != kFloat32 && call.width % 32 == 0;
  Handed all{};
  all.normed = met_of(*call.q, kind, tokens);
  all.seen = met_of(*call.out, kind, tokens);
  all.active = met_of(*call.fc2, kind, tokens);
  all.mixing.size = (tokens + (pairs ? 64 : 0)) * row;
  const int64_t norms = bytes_of(all.normed), seen = bytes_of(all.seen), active = bytes_of(all.active);
  const int64_t mixing = 3 * all.mixing.size * (pairs ? 2 : 4) + tokens * row * 4 + 128, first = norms > seen ? norms : seen;
  Room room{scratch.get(first + (mixing > active ? mixing : active) + 64)};
  place(all.normed, room);
  place(all.seen, room);
  room.take<uint8_t>(first);
  place(all.active, room);
  if (pairs) {
    all.mixing.pairs = room.take<uint16_t>(3 * all.mixing.size);
  } else {
    all.mixing.plain = room.take<float>(3 * all.mixing.size);
  }
  all.mixing.seen = room.take<float>(tokens * row);
  return all;
}

template <class S>
void tower_attention(const TowerCall& call, const Handed& all) {
  const int64_t hidden = call.q->inputs, row = call.heads * call.width;
  put_rows<S>(all.normed, call.threads, [&](int64_t token, float* values) {
    layer_norm<S>(call.x + token * hidden, call.norm1_weight, call.norm1_bias, hidden, static_cast<float>(call.eps),
                  values);
  });
  const Product* three[] = {call.q, call.k, call.v};
  meet<S>(three, 3, all.normed, piece_rows(3 * row, call.threads), call.threads,
          [&](int64_t i, int64_t first, int64_t count, int64_t at, int64_t width, float* values) {
            keep<S>(call, all.mixing, i, first, count, at, width, values);
          });
  attend_tiles<S>(call, all.mixing);
  put_rows<S>(all.seen, call.threads, [&](int64_t token, float* values) {
    std::memcpy(values, all.mixing.seen + token * row, static_cast<size_t>(row) * 4);
  });
}

// The residual: outputs of a piece onto `x`, into call.y.
template <class S>
void meet_residual(const TowerCall& call, const Product* product, const Met& met, const float* x) {
  const int64_t hidden = product->rows;
  meet<S>(&product, 1, met, piece_rows(hidden, call.threads), call.threads,
          [&](int64_t, int64_t first, int64_t count, int64_t at, int64_t width, const float* values) {
            for (int64_t t = 0; t < count; ++t) {
              const int64_t place = (first + t) * hidden + at;
              for (int64_t i = 0; i < width; i += S::kLanes) {
                S::store(call.y + place + i, S::add(S::load(x + place + i), S::load(values + t * width + i)));
              }
            }
          });
}

template <class S>
void tower_mlp(const TowerCall& call, const Handed& all) {
  const int64_t hidden = call.fc1->inputs, inner = call.fc1->rows;
  put_rows<S>(all.normed, call.threads, [&](int64_t token, float* values) {
    layer_norm<S>(call.y + token * hidden, call.norm2_weight, call.norm2_bias, hidden, static_cast<float>(call.eps),
                  values);
  });
  const Met& active = all.active;
  meet<S>(&call.fc1, 1, all.normed, kPiece, call.threads,
          [&](int64_t, int64_t first, int64_t count, int64_t at, int64_t width, float* values) {
            const int64_t end = at + width == inner ? active.padded - at : width;  // with the padding
            if (active.kind == kFloat32) {
              activate_all<S, false>(values, count * width, call.activation);
            } else {
              activate_all<S, true>(values, count * width, call.activation);
            }
            if (end == width) return put<S>(active, first, count, values, width, at, width);
            alignas(64) float wider[S::kTokens * kPiece] = {};
            for (int64_t t = 0; t < count; ++t) {
              std::memcpy(wider + t * kPiece, values + t * width, static_cast<size_t>(width) * 4);
            }
            put<S>(active, first, count, wider, kPiece, at, end);
          });
}

template <class S>
void tower(const TowerCall& call) {
  static thread_local Scratch scratch;
  const int64_t most = call.positions < kAtOnce ? kAtOnce / call.positions : 1;
  TowerCall part = call;
  for (int64_t begin = 0; begin < call.tiles; begin += most) {
    const int64_t place = begin * call.positions * call.q->inputs;
    part.tiles = call.tiles - begin < most ? call.tiles - begin : most;
    part.x = call.x + place;
    part.y = call.y + place;
    const Handed all = hand<S>(part, scratch);
    tower_attention<S>(part, all);
    meet_residual<S>(part, part.out, all.seen, part.x);
    tower_mlp<S>(part, all);
    meet_residual<S>(part, part.fc2, all.active, part.y);
  }
  scratch.trim();
}

}  // namespace
}  // namespace lapilli
