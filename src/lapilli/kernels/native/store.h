// New keys and values into the blocks of a cache, as they are or rounded to bfloat16.
#pragma once

#include <cstring>

#include "abi.h"

namespace lapilli {

// To the nearest, ties to even, as torch rounds.
inline uint16_t to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store_vector(void* base, int64_t at, const float* from, int64_t width, int64_t kind) {
  if (kind == kFloat32) {
    std::memcpy(static_cast<float*>(base) + at, from, static_cast<size_t>(width) * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(base) + at;
  for (int64_t i = 0; i < width; ++i) to[i] = to_bfloat(from[i]);
}

inline void store(const StoreCall& call) {
  for (int64_t t = 0; t < call.positions; ++t) {
    const int64_t place = call.blocks[t] * call.block_stride + call.offsets[t] * call.width;
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t to = place + h * call.head_stride;
      store_vector(call.keys, to, call.k + t * call.k_position + h * call.k_head, call.width, call.kind);
      store_vector(call.values, to, call.v + t * call.v_position + h * call.v_head, call.width, call.kind);
    }
  }
}

}  // namespace lapilli
