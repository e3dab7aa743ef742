// New keys and values into the blocks of a cache.
#pragma once

#include <cstring>

#include "abi.h"

namespace lapilli {

inline void store(const StoreCall& call) {
  const size_t bytes = static_cast<size_t>(call.width) * sizeof(float);
  for (int64_t t = 0; t < call.positions; ++t) {
    const int64_t place = call.blocks[t] * call.block_stride + call.offsets[t] * call.width;
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t to = place + h * call.head_stride;
      std::memcpy(call.keys + to, call.k + t * call.k_position + h * call.k_head, bytes);
      std::memcpy(call.values + to, call.v + t * call.v_position + h * call.v_head, bytes);
    }
  }
}

}  // namespace lapilli
