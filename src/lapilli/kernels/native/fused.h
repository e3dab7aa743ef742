// Small operations between the products, each in one pass over its rows.
#pragma once

#include <cmath>

#include "abi.h"
#include "exponential.h"
#include "pool.h"

namespace lapilli {
namespace {

constexpr int64_t kElements = 1 << 15;  // of a piece of work

// y = x / rms(x) * (offset + weight), by row; y may be x.
template <class S>
void rms_norm(const RowsCall& call) {
  using F = typename S::F;
  const int64_t width = call.width, body = width / S::kLanes * S::kLanes;
  const float offset = static_cast<float>(call.offset);
  const F offsets = S::fset(offset);
  for_pieces(call.threads, call.rows, 1 + kElements / width, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* x = call.x + r * call.x_stride;
      float* y = call.y + r * width;
      F squares = S::fzero();
      for (int64_t i = 0; i < body; i += S::kLanes) {
        const F v = S::load(x + i);
        squares = S::fma(v, v, squares);
      }
      float total = S::sum(squares);
      for (int64_t i = body; i < width; ++i) total += x[i] * x[i];
      const float by = 1.0f / std::sqrt(total / static_cast<float>(width) + static_cast<float>(call.eps));
      const F factor = S::fset(by);
      for (int64_t i = 0; i < body; i += S::kLanes) {
        S::store(y + i, S::mul(S::mul(S::load(x + i), factor), S::add(offsets, S::load(call.other + i))));
      }
      for (int64_t i = body; i < width; ++i) y[i] = x[i] * by * (offset + call.other[i]);
    }
  });
}

// y = silu(x) * other, element by element; silu(x) = x / (1 + e^-x).
template <class S>
void silu_mul(const RowsCall& call) {
  using F = typename S::F;
  const int64_t count = call.rows * call.width;
  const F one = S::fset(1.0f);
  for_pieces(call.threads, (count + kElements - 1) / kElements, 1, [&](int64_t first, int64_t last) {
    const int64_t end = last * kElements < count ? last * kElements : count;
    int64_t i = first * kElements;
    for (; i + S::kLanes <= end; i += S::kLanes) {
      const F x = S::load(call.x + i);
      const F below = S::add(one, exponential<S>(S::sub(S::fzero(), x)));
      S::store(call.y + i, S::mul(S::div(x, below), S::load(call.other + i)));
    }
    for (; i < end; ++i) call.y[i] = call.x[i] / (1.0f + std::exp(-call.x[i])) * call.other[i];
  });
}

// y = gelu(x) * other, element by element, by the tanh form: gelu(x) = x / (1 + e^-2u) with
// u = sqrt(2 / pi) (x + 0.044715 x^3).
template <class S>
void gelu_mul(const RowsCall& call) {
  using F = typename S::F;
  const int64_t count = call.rows * call.width;
  constexpr float kLinear = -2 * 0.7978845608028654f, kCubic = 0.044715f * kLinear;
  const F one = S::fset(1.0f), linear = S::fset(kLinear), cubic = S::fset(kCubic);
  for_pieces(call.threads, (count + kElements - 1) / kElements, 1, [&](int64_t first, int64_t last) {
    const int64_t end = last * kElements < count ? last * kElements : count;
    int64_t i = first * kElements;
    for (; i + S::kLanes <= end; i += S::kLanes) {
      const F x = S::load(call.x + i);
      const F power = S::mul(x, S::fma(S::mul(x, x), cubic, linear));
      const F below = S::add(one, exponential<S>(power));
      S::store(call.y + i, S::mul(S::div(x, below), S::load(call.other + i)));
    }
    for (; i < end; ++i) {
      const float x = call.x[i];
      call.y[i] = x / (1.0f + std::exp(x * (x * x * kCubic + kLinear))) * call.other[i];
    }
  });
}

// Each pair (i, i + width / 2) of a head turned by the angle of its position; the first half of the
// sines carries the minus. Heads of x and y lie anywhere, elements of a head side by side.
template <class S>
void rotate(const RotateCall& call) {
  using F = typename S::F;
  const int64_t half = call.width / 2;
  const int64_t step = 1 + kElements / (call.width * call.heads);
  for_pieces(call.threads, call.rows * call.positions, step, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t row = at / call.positions, t = at % call.positions;
      const float* cosine = call.cosine + at * call.width;
      const float* sine = call.sine + at * call.width;
      for (int64_t h = 0; h < call.heads; ++h) {
        const float* x = call.x + row * call.x_row + h * call.x_head + t * call.x_position;
        float* y = call.y + row * call.y_row + h * call.y_head + t * call.y_position;
        for (int64_t i = 0; i < half; i += S::kLanes) {
          const F low = S::load(x + i), high = S::load(x + half + i);
          S::store(y + i, S::fma(high, S::load(sine + i), S::mul(low, S::load(cosine + i))));
          S::store(y + half + i,
                   S::fma(low, S::load(sine + half + i), S::mul(high, S::load(cosine + half + i))));
        }
      }
    }
  });
}

}  // namespace
}  // namespace lapilli
