// 16 lanes in plain C++ (GNU vector types): every CPU, and the twin that the others are tested with.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"

namespace lapilli {
namespace {

struct Portable {
  static constexpr const char* kName = "portable";
  static constexpr int kLanes = 16;
  static constexpr int kTokens = 4;
  static constexpr int kFew = 4;  // of a tile with one block of output rows
  static constexpr int kVectors = 1;
  static constexpr int kByteBias = 128;

  typedef int32_t I __attribute__((vector_size(64)));
  typedef float F __attribute__((vector_size(64)));
  typedef uint8_t W __attribute__((vector_size(64)));
  struct P {};

  static W bytes(const uint8_t* p) {
    W w;
    std::memcpy(&w, p, 64);
    return w;
  }
  static W small_bytes(const uint8_t* p) { return bytes(p); }
  static void nibbles(const uint8_t* p, W& low, W& high) {
    const W v = bytes(p);
    low = v & 15;
    high = v >> 4;
  }
  static void store_bytes(uint8_t* p, W w) { std::memcpy(p, &w, 64); }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    const I lanes = iset(four);
    W w;
    std::memcpy(&w, &lanes, 64);
    return w;
  }
  static P begin(I) { return {}; }
  template <bool small>
  static void dot(P&, I& sum, W w, W a) {
    I words, signs;
    std::memcpy(&words, &w, 64);
    std::memcpy(&signs, &a, 64);
    for (int j = 0; j < 4; ++j) sum += ((words >> (8 * j)) & 255) * ((signs << (24 - 8 * j)) >> 24);
  }
  static void end(P, I&) {}
  // Nonlinear levels of nibbles, as bytes() returns weights.
  static W levels(W nibbles) {
    W w;
    for (int i = 0; i < 64; ++i) w[i] = static_cast<uint8_t>(kLevels[nibbles[i]] + kByteBias);
    return w;
  }
  static I signed_lanes(const int8_t* p) {
    I v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return v;
  }

  static I izero() { return I{}; }
  static I iset(int32_t v) { return I{} + v; }
  static I imul(I a, I b) { return a * b; }
  static I isub(I a, I b) { return a - b; }
  static I iadd(I a, I b) { return a + b; }
  static I widen(const uint8_t* p) {
    I v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return v;
  }
  template <int j>
  static I byte(W w) {
    I words;
    std::memcpy(&words, &w, 64);
    return (words >> (8 * j)) & 255;
  }

  static F fzero() { return F{}; }
  static F fset(float v) { return F{} + v; }
  static F load(const float* p) {
    F v;
    std::memcpy(&v, p, 64);
    return v;
  }
  static void store(float* p, F v) { std::memcpy(p, &v, 64); }
  static F half(const uint16_t* p) {
    F v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
  }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F to_float(I v) { return __builtin_convertvector(v, F); }

  static I max_bits(I m, F x) {
    I bits;
    std::memcpy(&bits, &x, 64);
    bits &= 0x7fffffff;
    for (int i = 0; i < kLanes; ++i) m[i] = bits[i] > m[i] ? bits[i] : m[i];
    return m;
  }
  static int32_t reduce_max(I v) {
    int32_t most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
  }
  static void store_rounded(int8_t* p, F v) {
    for (int i = 0; i < kLanes; ++i) {
      const float r = std::nearbyintf(v[i]);
      p[i] = static_cast<int8_t>(r >= -127.0f && r <= 127.0f ? r : -128.0f);  // NaN too
    }
  }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) {
    for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
  }
  static I nearest(F v) {
    I out;
    for (int i = 0; i < kLanes; ++i) out[i] = static_cast<int32_t>(std::nearbyintf(v[i]));
    return out;
  }
  // v * 2^n for results that are normal numbers.
  static F ldexp(F v, I n) {
    I bits;
    std::memcpy(&bits, &v, 64);
    bits += n << 23;
    std::memcpy(&v, &bits, 64);
    return v;
  }
  static float sum(F v) {
    float out = 0;
    for (int i = 0; i < kLanes; ++i) out += v[i];
    return out;
  }
  static float most(F v) {
    float out = v[0];
    for (int i = 1; i < kLanes; ++i) out = v[i] > out ? v[i] : out;
    return out;
  }
  static void sum4(F a, F b, F c, F d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
  }
  static F bfloat(const uint16_t* p) {
    I bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<int32_t>(p[i]) << 16;
    F v;
    std::memcpy(&v, &bits, 64);
    return v;
  }
  static F signed_bytes(const int8_t* p) {
    F v;
    for (int i = 0; i < kLanes; ++i) v[i] = p[i];
    return v;
  }
  static inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p); }

  static float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
      bits = sign | 0x7f800000 | (rest << 13);
    } else if (rest >= 0x0400) {
      bits = sign | ((rest << 13) + (112u << 23));
    } else {
      const float tiny = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2^-24
      std::memcpy(&bits, &tiny, 4);
      bits |= sign;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
};

}  // namespace
}  // namespace lapilli
