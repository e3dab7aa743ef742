// 8 lanes: AVX2, FMA, F16C; with AVX-VNNI (macro LAPILLI_AVXVNNI) the 256-bit vpdpbusd.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace lapilli {
namespace {

struct Avx2 {
#if defined(LAPILLI_AVXVNNI)
  static constexpr const char* kName = "avxvnni";
  static constexpr int kByteBias = 128;  // bytes are unsigned: weight + 128
  using P = struct Nothing {};
#else
  static constexpr const char* kName = "avx2";
  static constexpr int kByteBias = 0;  // bytes become signed when they are loaded
  using P = __m256i;
#endif
  static constexpr int kLanes = 8;
  static constexpr int kTokens = 4;
  static constexpr int kFew = 4;  // of a tile with one block of output rows
  static constexpr int kVectors = 2;

  using I = __m256i;
  using F = __m256;
  using W = __m256i;

  static W small_bytes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void nibbles(const uint8_t* p, W& low, W& high) {
    const __m256i v = small_bytes(p), mask = _mm256_set1_epi8(15);
    low = _mm256_and_si256(v, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(v, 4), mask);
  }
  static void store_bytes(uint8_t* p, W w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w);
  }
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }

#if defined(LAPILLI_AVXVNNI)
  static W bytes(const uint8_t* p) { return small_bytes(p); }
  static P begin(I) { return P(); }
  template <bool small>
  static void dot(P&, I& sum, W w, W a) {
    sum = _mm256_dpbusd_avx_epi32(sum, w, a);
  }
  static void end(P, I&) {}
#else
  static W bytes(const uint8_t* p) {
    return _mm256_xor_si256(small_bytes(p), _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static P begin(I) { return _mm256_setzero_si256(); }
  // vpmaddubsw saturates at 16 bits. Small weights: a pair is at most 2 * 15 * 127 = 3810, and the
  // 8 steps of a chunk 30480: they may be summed in 16 bits. Signed bytes: |a| * (w * sign a) is at
  // most 2 * 127 * 127 = 32258 a pair, so every pair is widened at once.
  template <bool small>
  static void dot(P& partial, I& sum, W w, W a) {
    if (small) {
      partial = _mm256_add_epi16(partial, _mm256_maddubs_epi16(w, a));
    } else {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }
  static void end(P partial, I& sum) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(partial, _mm256_set1_epi16(1)));
  }
#endif
  // Nonlinear levels of nibbles, as bytes() returns weights.
  static W levels(W nibbles) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels));
    const __m128i shifted = _mm_add_epi8(table, _mm_set1_epi8(static_cast<char>(kByteBias)));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(shifted), nibbles);
  }
  static I signed_lanes(const int8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }

  static I izero() { return _mm256_setzero_si256(); }
  static I iset(int32_t v) { return _mm256_set1_epi32(v); }
  static I imul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I widen(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  template <int j>
  static I byte(W w) {
    return _mm256_and_si256(_mm256_srli_epi32(w, 8 * j), _mm256_set1_epi32(255));
  }

  static F fzero() { return _mm256_setzero_ps(); }
  static F fset(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }

  static I max_bits(I m, F x) {
    const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
    return _mm256_max_epi32(m, bits);
  }
  static int32_t reduce_max(I v) {
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
    int32_t most = lanes[0];
    for (int i = 1; i < 8; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
  }
  static void store_rounded(int8_t* p, F v) {
    const __m256i ints = _mm256_cvtps_epi32(v);
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static I nearest(F v) { return _mm256_cvtps_epi32(v); }
  // v * 2^n for results that are normal numbers.
  static F ldexp(F v, I n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(n, 23)));
  }
  static float sum(F v) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
           ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
  }
  static float most(F v) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    float out = lanes[0];
    for (int i = 1; i < 8; ++i) out = lanes[i] > out ? lanes[i] : out;
    return out;
  }
  static void sum4(F a, F b, F c, F d, float* out) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
  static F bfloat(const uint16_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static F signed_bytes(const int8_t* p) {
    return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static inline __attribute__((always_inline)) void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace lapilli
