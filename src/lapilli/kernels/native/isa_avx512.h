// 16 lanes: AVX-512 F, BW, VL, VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace lapilli {
namespace {

struct Avx512 {
  static constexpr const char* kName = "avx512vnni";
  static constexpr int kLanes = 16;
  static constexpr int kTokens = 6;    // of a tile
  static constexpr int kFew = 8;  // of a tile with one block of output rows
  static constexpr int kVectors = 2;   // of output rows in a tile
  static constexpr int kByteBias = 128;  // bytes are unsigned: weight + 128

  using I = __m512i;
  using F = __m512;
  using W = __m512i;
  using P = __m512i;

  static W bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static W small_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void nibbles(const uint8_t* p, W& low, W& high) {
    const __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(v, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
  }
  static void store_bytes(uint8_t* p, W w) { _mm512_storeu_si512(p, w); }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static P begin(I) { return P(); }
  template <bool small>
  static void dot(P&, I& sum, W w, W a) {
    sum = _mm512_dpbusd_epi32(sum, w, a);
  }
  static void end(P, I&) {}

  // Nonlinear levels of nibbles, as bytes() returns weights.
  static W levels(W nibbles) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels));
    const __m128i shifted = _mm_xor_si128(table, _mm_set1_epi8(static_cast<char>(0x80)));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(shifted), nibbles);
  }
  static I signed_lanes(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static I izero() { return _mm512_setzero_si512(); }
  static I iset(int32_t v) { return _mm512_set1_epi32(v); }
  static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I widen(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int j>
  static I byte(W w) {
    return _mm512_and_si512(_mm512_srli_epi32(w, 8 * j), _mm512_set1_epi32(255));
  }

  static F fzero() { return _mm512_setzero_ps(); }
  static F fset(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }

  // The larger of m and the bits of |x|, as integers: a NaN is larger than everything and stays.
  static I max_bits(I m, F x) {
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    return _mm512_max_epi32(m, bits);
  }
  static int32_t reduce_max(I v) { return _mm512_reduce_max_epi32(v); }
  // Lanes rounded to the nearest, halves to even, as signed bytes.
  static void store_rounded(int8_t* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I nearest(F v) { return _mm512_cvtps_epi32(v); }
  // v * 2^n for results that are normal numbers.
  static F ldexp(F v, I n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(n, 23)));
  }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static float most(F v) { return _mm512_reduce_max_ps(v); }
  static void sum4(F a, F b, F c, F d, float* out) {
    const __m256 a2 = fold(a), b2 = fold(b), c2 = fold(c), d2 = fold(d);
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a2, b2), _mm256_hadd_ps(c2, d2));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  static __m256 fold(__m512 v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(v), high);
  }
  static F bfloat(const uint16_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static F signed_bytes(const int8_t* p) {
    return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static inline __attribute__((always_inline)) void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace lapilli
