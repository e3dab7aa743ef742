// Attention of one new position per row over blocks of keys and values: a piece of work is one row
// and one head of keys; all query heads of its group share what is read.
//
//   scores[group head][position]  ->  softmax  ->  sum of values
#pragma once

#include <cmath>

#include "abi.h"
#include "exponential.h"
#include "pool.h"

namespace lapilli {
namespace {

template <class S, int64_t kind>
inline typename S::F load_cache(const void* base, int64_t index) {
  if constexpr (kind == kFloat32) return S::load(static_cast<const float*>(base) + index);
  if constexpr (kind == kBfloat16) return S::bfloat(static_cast<const uint16_t*>(base) + index);
  if constexpr (kind == kFloat16) return S::half(static_cast<const uint16_t*>(base) + index);
  if constexpr (kind == kInt8) return S::signed_bytes(static_cast<const int8_t*>(base) + index);
}

constexpr int64_t cache_bytes(int64_t kind) {
  return kind == kFloat32 ? 4 : kind == kInt8 ? 1 : 2;
}

// One position of a cache, fetched before it is read.
template <class S, int64_t kind>
inline __attribute__((always_inline)) void fetch(const void* base, int64_t index, int64_t width) {
  const char* from = static_cast<const char*>(base) + index * cache_bytes(kind);
  for (int64_t byte = 0; byte < width * cache_bytes(kind); byte += 64) S::prefetch(from + byte);
}

// A sum over thousands of positions is made of sums over this many: added one by one in a float, every
// position would be rounded to the size of the whole sum. Powers of two.
constexpr int64_t kSumBlock = 128;

// One group: its queries [group, width] and the blocks of its row.
struct Group {
  const float* q;
  const float* slopes;
  const int32_t* table;
  float* out;
  int64_t size;
  int64_t head;   // of keys and values
  int64_t begin;  // first position that is seen
  int64_t end;
};

// body(first element, first scale, position, count, ahead) for every run of positions inside one block;
// `ahead` is how many elements further the next run begins. Processors fetch ahead inside a page only,
// and a run is about that long, so the loops ask for the next one.
template <class Body>
inline void for_runs(const AttentionCall& call, const Group& group, const Body& body) {
  for (int64_t at = group.begin; at < group.end;) {
    const int64_t inside = at % call.block_size;
    int64_t count = call.block_size - inside;
    if (count > group.end - at) count = group.end - at;
    const int64_t block = group.table[at / call.block_size];
    const int64_t scale = (block * call.kv_heads + group.head) * call.block_size + inside;
    const int64_t start = block * call.block_stride + group.head * call.head_stride + inside * call.width;
    const bool last = at + count >= group.end;
    const int64_t next = last ? block : group.table[(at + count) / call.block_size];
    const int64_t ahead = next * call.block_stride + group.head * call.head_stride - start;
    body(start, scale, at - group.begin, count, ahead);
    at += count;
  }
}

// Scores s as c tanh(s / c), with tanh(x) = 1 - 2 / (e^2x + 1); what lies beyond the positions of a
// head is overwritten by soften.
template <class S>
void cap_scores(float* scores, int64_t count, float cap) {
  using F = typename S::F;
  const F twice = S::fset(2.0f / cap), most = S::fset(cap), one = S::fset(1.0f), two = S::fset(2.0f * cap);
  for (int64_t s = 0; s < count; s += S::kLanes) {
    const F e = exponential<S>(S::mul(S::load(scores + s), twice));
    S::store(scores + s, S::sub(most, S::div(two, S::add(e, one))));
  }
}

// Up to four positions of a run and the scales of the whole numbers they are kept as.
struct Keys {
  int64_t at[4];  // the last of a run stands in for those beyond it
  int64_t count;
  const float* scales;
};

// G heads times four keys: what is read of a key serves all of them.
template <class S, int64_t kind, int G>
inline void score_heads(const AttentionCall& call, const Keys& keys, const float* q, float* scores, int64_t stride) {
  using F = typename S::F;
  const int64_t width = call.width;
  const float scale = static_cast<float>(call.scale);
  F sum[G][4];  // unrolled by hand of the compiler: in memory it would cost as much as the products
#pragma GCC unroll 16
  for (int i = 0; i < 4 * G; ++i) sum[i / 4][i % 4] = S::fzero();
  for (int64_t v = 0; v < width; v += S::kLanes) {
    F key[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) key[j] = load_cache<S, kind>(call.keys, keys.at[j] + v);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const F x = S::load(q + g * width + v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[g][j] = S::fma(x, key[j], sum[g][j]);
    }
  }
  alignas(16) float four[4 * G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) S::sum4(sum[g][0], sum[g][1], sum[g][2], sum[g][3], four + 4 * g);
  for (int g = 0; g < G; ++g) {
    float* target = scores + g * stride;
    for (int64_t j = 0; j < keys.count; ++j) {
      target[j] = four[4 * g + j] * scale;
      if (kind == kInt8) target[j] *= keys.scales[j];
    }
  }
}

template <class S, int64_t kind>
void score_group(const AttentionCall& call, const Group& group, float* scores, int64_t stride) {
  constexpr int kHeads = S::kLanes == 8 ? 2 : 4;  // AVX2 has 16 registers, the others 32
  const int64_t width = call.width;
  for_runs(call, group, [&](int64_t start, int64_t scales, int64_t at, int64_t count, int64_t ahead) {
    for (int64_t i = 0; i < count; i += 4) {
      Keys keys{};
      keys.count = count - i < 4 ? count - i : 4;
      if (kind == kInt8) keys.scales = call.key_scales + scales + i;
      for (int64_t j = 0; j < 4; ++j) {
        keys.at[j] = start + (i + (j < keys.count ? j : keys.count - 1)) * width;
        fetch<S, kind>(call.keys, keys.at[j] + ahead, width);
      }
      float* target = scores + at + i;
      int64_t g = 0;
      for (; g + kHeads <= group.size; g += kHeads) {
        score_heads<S, kind, kHeads>(call, keys, group.q + g * width, target + g * stride, stride);
      }
      for (; g < group.size; ++g) {
        score_heads<S, kind, 1>(call, keys, group.q + g * width, target + g * stride, stride);
      }
    }
  });
  if (call.softcap > 0) cap_scores<S>(scores, group.size * stride, static_cast<float>(call.softcap));
  if (group.slopes == nullptr) return;
  const int64_t seen = group.end - group.begin;
  for (int64_t g = 0; g < group.size; ++g) {
    for (int64_t s = 0; s < seen; ++s) {
      scores[g * stride + s] -= group.slopes[g] * static_cast<float>(seen - 1 - s);
    }
  }
}

// Scores of one head as exponentials, and one over their sum; padding adds 1e-38.
template <class S>
float soften(float* scores, int64_t seen, int64_t padded) {
  using F = typename S::F;
  for (int64_t s = seen; s < padded; ++s) scores[s] = -INFINITY;
  F most = S::load(scores);
  for (int64_t s = S::kLanes; s < padded; s += S::kLanes) most = S::max(most, S::load(scores + s));
  const F top = S::fset(S::most(most));
  F total = S::fzero();
  for (int64_t begin = 0; begin < padded; begin += kSumBlock * S::kLanes) {
    const int64_t left = padded - begin, end = begin + (left < kSumBlock * S::kLanes ? left : kSumBlock * S::kLanes);
    F part = S::fzero();
    for (int64_t s = begin; s < end; s += S::kLanes) {
      const F e = exponential<S>(S::sub(S::load(scores + s), top));
      S::store(scores + s, e);
      part = S::add(part, e);
    }
    total = S::add(total, part);
  }
  return 1.0f / S::sum(total);
}

// G heads times V vectors of the width: weighted values.
template <class S, int64_t kind, int G, int V>
void mix(const AttentionCall& call, const Group& group, const float* scores, int64_t stride, int64_t first,
         int64_t lane, const float* factor) {
  using F = typename S::F;
  F acc[G][V];
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) acc[g][v] = S::fzero();
  float* out = group.out + first * call.width + lane;
  for (int g = 0; g < G; ++g)
    for (int v = 0; v < V; ++v) S::store(out + g * call.width + v * S::kLanes, S::fzero());
  const auto add_block = [&]() {
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < V; ++v) {
        float* target = out + g * call.width + v * S::kLanes;
        S::store(target, S::add(S::load(target), acc[g][v]));
        acc[g][v] = S::fzero();
      }
  };
  const bool is_first = first == 0 && lane == 0;  // later passes find the values in the cache
  for_runs(call, group, [&](int64_t start, int64_t scales, int64_t at, int64_t count, int64_t ahead) {
    for (int64_t i = 0; i < count;) {
      const int64_t room = kSumBlock - (at + i) % kSumBlock, end = count - i < room ? count : i + room;
      for (; i < end; ++i) {
        const int64_t element = start + i * call.width + lane;
        if (is_first) fetch<S, kind>(call.values, element + ahead, call.width);
        F value[V];
        for (int v = 0; v < V; ++v) value[v] = load_cache<S, kind>(call.values, element + v * S::kLanes);
        const float scale = kind == kInt8 ? call.value_scales[scales + i] : 1.0f;
        for (int g = 0; g < G; ++g) {
          const F weight = S::fset(scores[(first + g) * stride + at + i] * scale);
          for (int v = 0; v < V; ++v) acc[g][v] = S::fma(weight, value[v], acc[g][v]);
        }
      }
      if ((at + i) % kSumBlock == 0) add_block();
    }
  });
  add_block();
  for (int g = 0; g < G; ++g) {
    const F by = S::fset(factor[first + g]);
    for (int v = 0; v < V; ++v) {
      float* target = out + g * call.width + v * S::kLanes;
      S::store(target, S::mul(S::load(target), by));
    }
  }
}

template <class S, int64_t kind, int G>
void mix_heads(const AttentionCall& call, const Group& group, const float* scores, int64_t stride,
               int64_t first, const float* factor) {
  constexpr int V = S::kLanes == 8 ? 2 : 4;  // AVX2 has 16 registers, the others 32
  int64_t lane = 0;
  for (; lane + V * S::kLanes <= call.width; lane += V * S::kLanes) {
    mix<S, kind, G, V>(call, group, scores, stride, first, lane, factor);
  }
  for (; lane < call.width; lane += S::kLanes) {
    mix<S, kind, G, 1>(call, group, scores, stride, first, lane, factor);
  }
}

template <class S, int64_t kind>
void attend_group(const AttentionCall& call, const Group& group, Scratch& scratch) {
  const int64_t seen = group.end - group.begin;
  const int64_t stride = (seen + 15) / 16 * 16;
  float* scores = reinterpret_cast<float*>(scratch.get((stride + 1) * group.size * 4));
  float* factor = scores + stride * group.size;
  score_group<S, kind>(call, group, scores, stride);
  for (int64_t g = 0; g < group.size; ++g) factor[g] = soften<S>(scores + g * stride, seen, stride);
  int64_t g = 0;
  for (; g + 4 <= group.size; g += 4) mix_heads<S, kind, 4>(call, group, scores, stride, g, factor);
  for (; g < group.size; ++g) mix_heads<S, kind, 1>(call, group, scores, stride, g, factor);
}

template <class S>
void attention(const AttentionCall& call) {
  const int64_t group_size = call.heads / call.kv_heads;
  int64_t longest = 0;
  for (int64_t b = 0; b < call.rows; ++b) longest = call.lengths[b] > longest ? call.lengths[b] : longest;
  const int64_t work = longest * call.width * group_size;
  const int64_t step = 1 + (int64_t{1} << 14) / (work + 1);
  for_pieces(call.threads, call.rows * call.kv_heads, step, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece / call.kv_heads, head = piece % call.kv_heads;
      const int64_t first = row * call.heads + head * group_size;
      Group group{};
      group.q = call.q + first * call.width;
      group.slopes = call.slopes ? call.slopes + head * group_size : nullptr;
      group.table = call.table + row * call.table_stride;
      group.out = call.out + first * call.width;
      group.size = group_size;
      group.head = head;
      group.end = call.lengths[row];
      group.begin = call.window > 0 && group.end > call.window ? group.end - call.window : 0;
      switch (call.kind) {
        case kFloat32: attend_group<S, kFloat32>(call, group, scratch); break;
        case kBfloat16: attend_group<S, kBfloat16>(call, group, scratch); break;
        default: attend_group<S, kInt8>(call, group, scratch);
      }
    }
    scratch.trim();
  });
}

}  // namespace
}  // namespace lapilli
