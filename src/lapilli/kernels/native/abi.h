// The structures that cross from Python (kernels/library.py mirrors them field by field) and the
// table of functions that every instruction set fills. Knows no torch and no Python.
//
// Packed weights, one layout for every instruction set, in blocks of 16 output rows:
//   8 bits   data[block][input / 4][row 16][input % 4]            one byte = weight + 128
//   4 bits   data[block][input / 8][row 16][input % 4]            low nibble: inputs 0-3 of the 8,
//                                                                 high nibble: inputs 4-7
// so 64 bytes are one operand of vpdpbusd (16 rows x 4 inputs). Rows are padded to 16 and inputs
// to 32 with weights of zero; groups of `group` inputs share a scale, the last one may be shorter.
//
// 4 bits with nonlinear levels: every span of 16 inputs of a row has a signed scale, and
//   weight = scale of the row * scale of the span * kLevels[nibble]
//   span_scales  [block][span][row 16]
// so sums over a span are scaled as integers.
#pragma once

#include <cstdint>

namespace lapilli {

constexpr int kAbi = 15;  // rises when anything here changes; kernels/library.py compares

constexpr int64_t kBlock = 16;  // output rows of a block
constexpr int64_t kChunk = 32;  // inputs are padded to this
constexpr int64_t kSpan = 16;   // inputs that share a scale of nonlinear levels

// The 16 levels, closer to each other near zero, where most weights are.
// Source: IQ4_NL of ggml, whose files hold the same numbers.
constexpr int8_t kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Weights {
  const uint8_t* data;
  const uint16_t* half_scales;  // [block][group][16] float16, 4 bits
  const float* row_scales;      // [block][16], 8 bits and nonlinear levels
  const uint8_t* zeros;         // [block][group][16], or null: 8
  const int8_t* span_scales;    // of nonlinear levels, or null
  const float* bias;            // [block][16], or null
  int64_t rows;
  int64_t inputs;
  int64_t group;  // of the activations; of the weights too, at 4 bits with linear levels
  int64_t bits;

  int64_t blocks() const { return (rows + kBlock - 1) / kBlock; }
  int64_t padded() const { return (inputs + kChunk - 1) / kChunk * kChunk; }
  int64_t groups() const { return (padded() + group - 1) / group; }
  int64_t spans() const { return padded() / kSpan; }
  int64_t block_bytes() const { return padded() * kBlock * bits / 8; }
};

struct LinearCall {
  Weights weights;
  const float* x;  // [tokens, inputs], rows x_stride apart
  float* y;        // [tokens, rows], rows y_stride apart
  int64_t tokens;
  int64_t x_stride;
  int64_t y_stride;
  int64_t threads;
  int64_t weight_only;  // 1: activations stay float32
};

enum NumberKind : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kFloat16 = 3 };

struct AttentionCall {
  const float* q;             // [rows, heads, width]
  const void* keys;           // [blocks, kv_heads, block_size, width], strides below
  const void* values;         // likewise
  const float* key_scales;    // [blocks, kv_heads, block_size], int8 only
  const float* value_scales;  // likewise
  const int32_t* table;       // [rows, table_stride]
  const int32_t* lengths;     // [rows]
  const float* slopes;        // [heads], or null
  float* out;                 // [rows, heads, width]
  int64_t rows;
  int64_t heads;
  int64_t kv_heads;
  int64_t block_size;
  int64_t width;  // a multiple of 16
  int64_t table_stride;
  int64_t block_stride;  // elements from one block of keys or values to the next
  int64_t head_stride;   // and from one head to the next
  int64_t kind;
  int64_t window;  // 0: none
  int64_t threads;
  double scale;
  double softcap;  // 0: none
};

// Weights as torch has them, times few tokens.
struct DenseCall {
  const void* w;      // [rows, inputs], rows w_stride elements apart
  const float* x;     // [tokens, inputs], rows x_stride apart
  const float* bias;  // [rows], or null
  float* y;           // [tokens, rows], rows y_stride apart
  int64_t rows;
  int64_t inputs;
  int64_t tokens;
  int64_t w_stride;
  int64_t x_stride;
  int64_t y_stride;
  int64_t kind;  // of the weights: float32, bfloat16 or float16
  int64_t threads;
};

// Many new positions per row, the last `queries` of `positions`; elements of a head lie side by side.
struct PrefillCall {
  const float* q;       // [batch, heads, queries, width], strides below
  const float* keys;    // [batch, kv_heads, positions, width]
  const float* values;  // likewise
  const float* slopes;  // [heads], or null
  float* out;           // as q
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t queries;
  int64_t positions;
  int64_t width;  // a multiple of 16
  int64_t q_row;
  int64_t q_head;
  int64_t q_position;
  int64_t k_row;
  int64_t k_head;
  int64_t k_position;
  int64_t v_row;
  int64_t v_head;
  int64_t v_position;
  int64_t out_row;
  int64_t out_head;
  int64_t out_position;
  int64_t causal;  // 0: every query sees every position
  int64_t window;  // 0: none
  int64_t threads;
  double scale;
};

// New keys and values into the blocks of a cache of float32.
struct StoreCall {
  const float* k;  // [positions, heads, width], strides below, elements side by side
  const float* v;
  void* keys;  // [blocks, heads, block_size, width]
  void* values;
  const int64_t* blocks;   // [positions]
  const int64_t* offsets;  // [positions], inside the block
  int64_t positions;
  int64_t heads;
  int64_t width;
  int64_t k_position;
  int64_t k_head;
  int64_t v_position;
  int64_t v_head;
  int64_t block_stride;
  int64_t head_stride;
  int64_t kind;  // of keys and values: kFloat32 or kBfloat16
};

struct RowsCall {
  const float* x;      // [rows, width], rows x_stride apart (silu_mul, gelu_mul: width)
  const float* other;  // rms_norm: weight [width]; silu_mul, gelu_mul: [rows, width]
  float* y;            // [rows, width]
  int64_t rows;
  int64_t width;
  int64_t x_stride;
  int64_t threads;
  double eps;
  double offset;  // added to the weight of rms_norm
};

struct RotateCall {
  const float* x;       // [rows, heads, positions, width], strides below, elements side by side
  const float* cosine;  // [rows, positions, width]
  const float* sine;    // likewise
  float* y;             // as x
  int64_t rows;
  int64_t heads;
  int64_t positions;
  int64_t width;  // a multiple of 32
  int64_t x_row;
  int64_t x_head;
  int64_t x_position;
  int64_t y_row;
  int64_t y_head;
  int64_t y_position;
  int64_t threads;
};

// A linear layer: packed, or as torch has it.
struct Product {
  const Weights* packed;  // or null
  const void* plain;      // [rows, inputs], rows stride elements apart
  const float* bias;      // of a plain one, or null
  int64_t rows;
  int64_t inputs;
  int64_t stride;
  int64_t kind;  // of a plain one: float32 or bfloat16
};

// A decoder layer for a few positions, each the last of its row of a cache of float32.
struct LayerCall {
  const float* input_norm;
  const float* mlp_norm;
  const float* attention_out_norm;  // of what attention adds, or null
  const float* mlp_out_norm;        // of what the MLP adds, or null
  const float* q_norm;              // [width], of every head before it is turned, or null
  const float* k_norm;              // likewise
  const Product* q;
  const Product* k;
  const Product* v;
  const Product* o;
  const Product* gate;
  const Product* up;
  const Product* down;
  const float* x;       // [tokens, hidden]
  float* y;             // likewise
  const float* cosine;  // [tokens, width]
  const float* sine;    // likewise
  void* keys;           // [blocks, kv_heads, block_size, width]
  void* values;
  const int64_t* blocks;   // [tokens], where new keys and values go
  const int64_t* offsets;  // likewise
  const int32_t* table;    // [tokens, table_stride]
  const int32_t* lengths;  // [tokens]
  int64_t tokens;
  int64_t heads;
  int64_t kv_heads;
  int64_t width;  // a multiple of 32
  int64_t block_size;
  int64_t table_stride;
  int64_t block_stride;
  int64_t head_stride;
  int64_t kind;         // of keys and values: kFloat32 or kBfloat16
  int64_t window;       // 0: none
  int64_t weight_only;  // of packed layers
  int64_t gelu;         // 1: the MLP's activation is GELU's tanh form, 0: SiLU
  int64_t threads;
  double scale;
  double eps;
  double norm_offset;  // added to the weights of the norms
  double softcap;      // of attention scores, 0: none
};

// All layers of a decoder, one after the other: what differs from step to step, in place of what the
// calls of the layers say about it.
struct StepCall {
  const float* x;  // [tokens, hidden]
  float* y;        // likewise
  const float* cosines[2];  // [tokens, width], of layers that are not local and of local ones
  const float* sines[2];    // likewise
  void* const* keys;        // of every layer
  void* const* values;
  const uint8_t* local;  // 1 where the second of the two tables turns a layer
  const int64_t* blocks;
  const int64_t* offsets;
  const int32_t* table;
  const int32_t* lengths;
  int64_t layers;
  int64_t tokens;
  int64_t block_size;
  int64_t table_stride;
  int64_t block_stride;
  int64_t head_stride;
  int64_t kind;
  int64_t threads;
};

// Weights as floats to 4 bits with nonlinear levels; `padded` inputs.
struct RoundCall {
  const float* w;    // [rows, inputs], rows stride elements apart
  uint8_t* data;     // of Weights, as the two that follow
  float* row_scales;
  int8_t* span_scales;
  int64_t* refused;  // set where a weight is no number, or too large for a scale
  int64_t rows;
  int64_t inputs;
  int64_t padded;
  int64_t stride;
  int64_t threads;
};

enum Activation : int64_t { kQuickGelu = 0, kGeluTanh = 1, kGelu = 2 };

// A layer of a vision transformer for all positions of some tiles (tower.h).
struct TowerCall {
  const float* norm1_weight;  // [hidden]
  const float* norm1_bias;
  const float* norm2_weight;
  const float* norm2_bias;
  const Product* q;  // rows of every product are multiples of 16
  const Product* k;
  const Product* v;
  const Product* out;
  const Product* fc1;
  const Product* fc2;
  const float* x;  // [tiles, positions, hidden]
  float* y;        // likewise
  int64_t tiles;
  int64_t positions;
  int64_t heads;
  int64_t width;       // of a head, a multiple of 16
  int64_t kind;        // of all products: kFloat32, kBfloat16, or kInt8 for packed ones of 8 bits
  int64_t activation;  // between fc1 and fc2
  int64_t threads;
  double scale;
  double eps;
};

struct Table {
  const char* name;
  void (*linear)(const LinearCall*, int64_t count);
  void (*dense)(const DenseCall&);
  void (*attention)(const AttentionCall&);
  void (*prefill)(const PrefillCall&);
  void (*rms_norm)(const RowsCall&);
  void (*silu_mul)(const RowsCall&);
  void (*gelu_mul)(const RowsCall&);
  void (*rotate)(const RotateCall&);
  void (*layer)(const LayerCall&);
  void (*step)(const StepCall&, const LayerCall* layers);
  void (*round_levels)(const RoundCall&);
  void (*tower)(const TowerCall&);
};

// For kAvx512 on CPUs that have products of bfloat16 too.
void tower_avx512bf16(const TowerCall& call);

extern const Table kPortable;
extern const Table kAvx2;
extern const Table kAvxVnni;
extern const Table kAvx512;
extern const Table kAmx;
extern const Table kNeon;
extern const Table kNeonDot;

}  // namespace lapilli
