// A whole decoder layer for a few positions, and all layers of a decoder: the same operations, in the order
// of lm/decoder.py, without a caller between them. One token is otherwise spent in callers, and memory, which
// decides how long it takes, stands still meanwhile.
#pragma once

#include "attention.h"
#include "dense.h"
#include "fused.h"
#include "linear.h"
#include "store.h"

namespace lapilli {
namespace {

inline bool packed_alike(const Weights& a, const Weights& b) {
  return a.bits == b.bits && a.group == b.group && (a.zeros == nullptr) == (b.zeros == nullptr) &&
         (a.span_scales == nullptr) == (b.span_scales == nullptr);
}

// The products of one input with layers that are all packed, or all plain. Neighbours that are packed alike
// share a call, and the activations that it rounds.
template <class S>
void products(const LayerCall& call, const Product* const* layers, float* const* y, int64_t count, const float* x) {
  const int64_t tokens = call.tokens, inputs = layers[0]->inputs;
  if (layers[0]->packed != nullptr) {
    LinearCall calls[3];
    int64_t waiting = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Weights& packed = *layers[i]->packed;
      if (waiting > 0 && !packed_alike(calls[0].weights, packed)) {
        linear<S>(calls, waiting);
        waiting = 0;
      }
      calls[waiting++] = {packed, x, y[i], tokens, inputs, layers[i]->rows, call.threads, call.weight_only};
    }
    return linear<S>(calls, waiting);
  }
  for (int64_t i = 0; i < count; ++i) {
    const Product& p = *layers[i];
    dense<S>({p.plain, x, p.bias, y[i], p.rows, inputs, tokens, p.stride, inputs, p.rows, p.kind, call.threads});
  }
}

template <class S>
void product(const LayerCall& call, const Product& layer, const float* x, float* y) {
  const Product* layers[] = {&layer};
  float* targets[] = {y};
  products<S>(call, layers, targets, 1, x);
}

// Rows through a norm into `y`, which may be `x`; without a weight nothing happens.
template <class S>
void norm(const LayerCall& call, const float* weight, const float* x, float* y, int64_t rows, int64_t width) {
  if (weight != nullptr) rms_norm<S>({x, weight, y, rows, width, width, call.threads, call.eps, call.norm_offset});
}

inline void add(const float* a, const float* b, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = a[i] + b[i];
}

// Every head of every position turned; what is turned lies [tokens, heads, width].
template <class S>
void rotate_heads(const LayerCall& call, float* x, int64_t heads) {
  const int64_t width = call.width;
  rotate<S>({x, call.cosine, call.sine, x, 1, heads, call.tokens, width, 0, width, heads * width, 0, width,
             heads * width, call.threads});
}

template <class S>
void attend_layer(const LayerCall& call, const float* q, const float* k, const float* v, float* seen) {
  const int64_t width = call.width, kv = call.kv_heads * width;
  store({k, v, call.keys, call.values, call.blocks, call.offsets, call.tokens, call.kv_heads, width, kv, width, kv,
         width, call.block_stride, call.head_stride, call.kind});
  AttentionCall attend{};
  attend.q = q;
  attend.keys = call.keys;
  attend.values = call.values;
  attend.table = call.table;
  attend.lengths = call.lengths;
  attend.out = seen;
  attend.rows = call.tokens;
  attend.heads = call.heads;
  attend.kv_heads = call.kv_heads;
  attend.block_size = call.block_size;
  attend.width = width;
  attend.table_stride = call.table_stride;
  attend.block_stride = call.block_stride;
  attend.head_stride = call.head_stride;
  attend.kind = call.kind;
  attend.window = call.window;
  attend.threads = call.threads;
  attend.scale = call.scale;
  attend.softcap = call.softcap;
  attention<S>(attend);
}

template <class S>
void compute_layer(const LayerCall& call) {
  static thread_local Scratch scratch;
  const int64_t tokens = call.tokens, hidden = call.q->inputs, inner = call.down->inputs;
  const int64_t queries = call.heads * call.width, kv = call.kv_heads * call.width;
  const int64_t size = tokens * (2 * hidden + 2 * queries + 2 * kv + 2 * inner);
  float* normed = reinterpret_cast<float*>(scratch.get(size * 4));
  float* update = normed + tokens * hidden;
  float* q = update + tokens * hidden;
  float* seen = q + tokens * queries;
  float* k = seen + tokens * queries;
  float* v = k + tokens * kv;
  float* gate = v + tokens * kv;
  float* up = gate + tokens * inner;

  norm<S>(call, call.input_norm, call.x, normed, tokens, hidden);
  const Product* three[] = {call.q, call.k, call.v};
  float* qkv[] = {q, k, v};
  products<S>(call, three, qkv, 3, normed);
  norm<S>(call, call.q_norm, q, q, tokens * call.heads, call.width);
  norm<S>(call, call.k_norm, k, k, tokens * call.kv_heads, call.width);
  rotate_heads<S>(call, q, call.heads);
  rotate_heads<S>(call, k, call.kv_heads);
  attend_layer<S>(call, q, k, v, seen);
  product<S>(call, *call.o, seen, update);
  norm<S>(call, call.attention_out_norm, update, update, tokens, hidden);
  add(call.x, update, call.y, tokens * hidden);

  norm<S>(call, call.mlp_norm, call.y, normed, tokens, hidden);
  const Product* two[] = {call.gate, call.up};
  float* gates[] = {gate, up};
  products<S>(call, two, gates, 2, normed);
  const RowsCall gated{gate, up, gate, tokens, inner, inner, call.threads, 0.0, 0.0};
  call.gelu ? gelu_mul<S>(gated) : silu_mul<S>(gated);
  product<S>(call, *call.down, gate, update);
  norm<S>(call, call.mlp_out_norm, update, update, tokens, hidden);
  add(call.y, update, call.y, tokens * hidden);
}

template <class S>
void layer(const LayerCall& call) {
  with_team(call.threads, [&] { compute_layer<S>(call); });
}

template <class S>
void step(const StepCall& now, const LayerCall* layers) {
  with_team(now.threads, [&] {
    for (int64_t i = 0; i < now.layers; ++i) {
      LayerCall call = layers[i];
      call.x = i == 0 ? now.x : now.y;
      call.y = now.y;
      call.cosine = now.cosines[now.local[i]];
      call.sine = now.sines[now.local[i]];
      call.keys = now.keys[i];
      call.values = now.values[i];
      call.blocks = now.blocks;
      call.offsets = now.offsets;
      call.table = now.table;
      call.lengths = now.lengths;
      call.tokens = now.tokens;
      call.block_size = now.block_size;
      call.table_stride = now.table_stride;
      call.block_stride = now.block_stride;
      call.head_stride = now.head_stride;
      call.kind = now.kind;
      call.threads = now.threads;
      compute_layer<S>(call);
    }
  });
}

}  // namespace
}  // namespace lapilli
