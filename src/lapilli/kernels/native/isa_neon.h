// 4 lanes: AArch64 NEON; with the dot product extension (macro LAPILLI_NEONDOT) sdot.
// Weights become signed when they are loaded: there is no product of unsigned and signed bytes.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "abi.h"

namespace lapilli {
namespace {

struct Neon {
#if defined(LAPILLI_NEONDOT)
  static constexpr const char* kName = "neondot";
  static constexpr int kTokens = 6;
  static constexpr int kFew = 6;  // of a tile with one block of output rows
  using P = struct Nothing {};
#else
  static constexpr const char* kName = "neon";
  static constexpr int kTokens = 2;  // two registers of 16-bit sums each: more do not fit
  static constexpr int kFew = 2;
  using P = int16x8x2_t;
#endif
  static constexpr int kLanes = 4;
  static constexpr int kVectors = 4;  // a whole block of rows: its bytes are read in one run
  static constexpr int kByteBias = 0;

  using I = int32x4_t;
  using F = float32x4_t;
  using W = uint8x16_t;

  static W small_bytes(const uint8_t* p) { return vld1q_u8(p); }
  static W bytes(const uint8_t* p) { return veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)); }
  static void nibbles(const uint8_t* p, W& low, W& high) {
    const W v = vld1q_u8(p);
    low = vandq_u8(v, vdupq_n_u8(15));
    high = vshrq_n_u8(v, 4);
  }
  static void store_bytes(uint8_t* p, W w) { vst1q_u8(p, w); }

#if defined(LAPILLI_NEONDOT)
  // sdot repeats a lane of its operand by itself: loading one is enough.
  static W broadcast(const int8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vcombine_u8(vcreate_u8(four), vcreate_u8(0));
  }
  static P begin(I) { return P(); }
  template <bool small>
  static void dot(P&, I& sum, W w, W a) {
    const int8x8_t four = vreinterpret_s8_u8(vget_low_u8(a));
    sum = vdotq_lane_s32(sum, vreinterpretq_s8_u8(w), four, 0);
  }
  static void end(P, I&) {}
#else
  static W broadcast(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return vreinterpretq_u8_s32(vdupq_n_s32(four));
  }
  static P begin(I) { return {{vdupq_n_s16(0), vdupq_n_s16(0)}}; }
  // Small weights: a product is at most 15 * 127 = 1905, and the 8 steps of a chunk 15240: they are
  // summed in 16 bits. Of signed bytes only a pair fits, 2 * 128 * 127 = 32512: widened at once.
  template <bool small>
  static void dot(P& partial, I& sum, W weight, W a) {
    const int8x16_t w = vreinterpretq_s8_u8(weight), x = vreinterpretq_s8_u8(a);
    if (small) {
      partial.val[0] = vmlal_s8(partial.val[0], vget_low_s8(w), vget_low_s8(x));
      partial.val[1] = vmlal_high_s8(partial.val[1], w, x);
    } else {
      const int16x8_t first = vmull_s8(vget_low_s8(w), vget_low_s8(x));
      sum = vpadalq_s16(sum, vpaddq_s16(first, vmull_high_s8(w, x)));
    }
  }
  static void end(P partial, I& sum) {
    sum = vpadalq_s16(sum, vpaddq_s16(partial.val[0], partial.val[1]));
  }
#endif
  // Nonlinear levels of nibbles, as bytes() returns weights.
  static W levels(W nibbles) { return vqtbl1q_u8(vreinterpretq_u8_s8(vld1q_s8(kLevels)), nibbles); }
  static I signed_lanes(const int8_t* p) {
    return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(four_bytes(p)))));
  }

  static I izero() { return vdupq_n_s32(0); }
  static I iset(int32_t v) { return vdupq_n_s32(v); }
  static I imul(I a, I b) { return vmulq_s32(a, b); }
  static I isub(I a, I b) { return vsubq_s32(a, b); }
  static I iadd(I a, I b) { return vaddq_s32(a, b); }
  static I widen(const uint8_t* p) {
    const uint16x4_t v = vget_low_u16(vmovl_u8(vreinterpret_u8_u32(four_bytes(p))));
    return vreinterpretq_s32_u32(vmovl_u16(v));
  }
  template <int j>
  static I byte(W w) {
    uint32x4_t v = vreinterpretq_u32_u8(w);
    if constexpr (j > 0) v = vshrq_n_u32(v, 8 * j);
    return vreinterpretq_s32_u32(vandq_u32(v, vdupq_n_u32(255)));
  }

  static F fzero() { return vdupq_n_f32(0.0f); }
  static F fset(float v) { return vdupq_n_f32(v); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }

  static I max_bits(I m, F x) { return vmaxq_s32(m, vreinterpretq_s32_f32(vabsq_f32(x))); }
  static int32_t reduce_max(I v) { return vmaxvq_s32(v); }
  // Rounded to the nearest, halves to even; NaN becomes 0, its scale carries it on.
  static void store_rounded(int8_t* p, F v) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(v));
    const int8x8_t small = vqmovn_s16(vcombine_s16(words, words));
    const int32_t four = vget_lane_s32(vreinterpret_s32_s8(small), 0);
    std::memcpy(p, &four, 4);
  }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }  // NaN where either is
  static I nearest(F v) { return vcvtnq_s32_f32(v); }
  // v * 2^n for results that are normal numbers.
  static F ldexp(F v, I n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(n, 23)));
  }
  static float sum(F v) { return vaddvq_f32(v); }
  static float most(F v) { return vmaxvq_f32(v); }
  static void sum4(F a, F b, F c, F d, float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
  }
  static F bfloat(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static F signed_bytes(const int8_t* p) {
    const int16x8_t v = vmovl_s8(vreinterpret_s8_u32(four_bytes(p)));
    return to_float(vmovl_s16(vget_low_s16(v)));
  }
  static inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p); }

  static uint32x2_t four_bytes(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vdup_n_u32(four);
  }
};

}  // namespace
}  // namespace lapilli
