// Tiles of bytes: AMX on top of isa_avx512bf16.h, which every CPU with tiles has too. Only products with many
// tokens use them (matrix.h).
#pragma once

#include "isa_avx512bf16.h"

namespace lapilli {
namespace {

struct Amx : Avx512Bf16 {
  static constexpr const char* kName = "amxint8";
  static constexpr int64_t kMatrixFrom = 24;  // tokens; from here tiles pay

  // The shapes of the tiles, for the calling thread until `end_tiles`. All have 16 rows of 64 bytes.
  static void begin_tiles() {
    alignas(64) uint8_t shapes[64] = {1};
    for (int i = 0; i < 8; ++i) {
      shapes[16 + 2 * i] = 64;
      shapes[48 + i] = 16;
    }
    _tile_loadconfig(shapes);
  }
  static void end_tiles() { _tile_release(); }

  // Two tiles of tokens times two of weights over `steps` times 64 inputs: sums of [token tile][weight tile][16][16].
  // A tile of tokens holds [16][64] signed bytes, one of weights [16 times 4 inputs][16 rows][4].
  template <bool are_signed>
  static void multiply(const int8_t* first, const int8_t* second, const uint8_t* low, const uint8_t* high, int64_t steps,
                       int32_t* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps * kTileBytes; s += kTileBytes) {
      _tile_loadd(4, first + s, 64);
      _tile_loadd(6, low + s, 64);
      _tile_loadd(7, high + s, 64);
      _tile_loadd(5, second + s, 64);
      if (are_signed) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }

  static I iload(const int32_t* p) { return _mm512_load_si512(p); }
  // 256 * high + low.
  static I joined(I high, I low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }

  // Scales of a span for 16 rows, each beside four inputs: two halves of 16-bit integers.
  struct Span {
    __m512i half[2];
  };
  static Span span(const int8_t* p) {
    const __m512i rows = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i four = _mm512_set_epi32(0x0f0f0f0f, 0x0e0e0e0e, 0x0d0d0d0d, 0x0c0c0c0c, 0x0b0b0b0b, 0x0a0a0a0a,
                                          0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                                          0x03030303, 0x02020202, 0x01010101, 0x00000000);
    return halves(_mm512_shuffle_epi8(rows, four));
  }
  // Levels of nibbles times the scales of their span, as two bytes: 256 * high + low, both signed.
  static void store_scaled_levels(W nibbles, const Span& by, uint8_t* low, uint8_t* high) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kLevels));
    const Span levels = halves(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles));
    for (int i = 0; i < 2; ++i) {
      const __m512i weight = _mm512_mullo_epi16(levels.half[i], by.half[i]);
      const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(weight, _mm512_set1_epi16(128)), 8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 32 * i), _mm512_cvtepi16_epi8(weight));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + 32 * i), _mm512_cvtepi16_epi8(upper));
    }
  }

 private:
  static constexpr int64_t kTileBytes = 1024;

  static Span halves(__m512i bytes) {
    return {{_mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)),
             _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1))}};
  }
};

}  // namespace
}  // namespace lapilli
