// 16 lanes with products of bfloat16 pairs: AVX-512 BF16 on top of isa_avx512.h. Only the layer of a tower
// uses them (tower.h).
#pragma once

#include "isa_avx512.h"

namespace lapilli {
namespace {

struct Avx512Bf16 : Avx512 {
  static constexpr bool kPairs = true;

  static W units(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static W unit(const uint32_t* p) { return _mm512_set1_epi32(static_cast<int32_t>(*p)); }
  static F pair(F sum, W w, W a) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)a); }

  // Two vectors of floats, rounded, side by side.
  static void store_pairs(uint32_t* p, F first, F second) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
  // Sixteen numbers of one row beside those of another.
  static void join(uint32_t* p, const uint16_t* first, const uint16_t* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // 2^x within 4e-5, which pairs and bytes round away.
  static F rough_power(F x) {
    const F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = _mm512_sub_ps(x, whole);
    F sum = _mm512_set1_ps(9.6181291e-3f);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, whole);
  }
  // Within 2^-14.
  static F rough_inverse(F x) { return _mm512_rcp14_ps(x); }

  // Sixteen rows of sixteen units as columns.
  static void transpose(const char* from, int64_t bytes, uint32_t* to, int64_t stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * bytes);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
      b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
      _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
      _mm512_storeu_si512(to + (i + 8) * stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
  }
};

}  // namespace
}  // namespace lapilli
