// BLAKE2b with 8 bytes and no key, over many short texts at once. Source: RFC 7693, section 3.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace lapilli {

class Blake2b64 {
 public:
  // The digest as a little-endian number.
  static uint64_t of(const unsigned char* text, uint64_t size) {
    uint64_t state[8];
    std::memcpy(state, kStart, sizeof state);
    state[0] ^= 0x01010000 ^ 8;  // parameters: 8 bytes of digest, no key, one tree node
    uint64_t done = 0;
    for (; size - done > kBlock; done += kBlock) compress(state, text + done, done + kBlock, false);
    unsigned char last[kBlock] = {};
    if (size > done) std::memcpy(last, text + done, size - done);
    compress(state, last, size, true);
    return state[0];
  }

 private:
  static constexpr uint64_t kBlock = 128;
  static constexpr uint64_t kStart[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b,
                                         0xa54ff53a5f1d36f1, 0x510e527fade682d1, 0x9b05688c2b3e6c1f,
                                         0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
  static constexpr unsigned char kOrder[10][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
      {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
      {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
      {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
      {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
      {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

  static inline __attribute__((always_inline)) uint64_t turned(uint64_t value, int bits) { return value >> bits | value << (64 - bits); }

  static inline __attribute__((always_inline)) void mix(uint64_t* v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x;
    v[d] = turned(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = turned(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = turned(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = turned(v[b] ^ v[c], 63);
  }

  // Which words are mixed is known when this is compiled: so they stay in registers.
  template <int Round>
  static inline __attribute__((always_inline)) void round(uint64_t* v, const uint64_t* m) {
    constexpr const unsigned char* at = kOrder[Round % 10];
    mix(v, 0, 4, 8, 12, m[at[0]], m[at[1]]);
    mix(v, 1, 5, 9, 13, m[at[2]], m[at[3]]);
    mix(v, 2, 6, 10, 14, m[at[4]], m[at[5]]);
    mix(v, 3, 7, 11, 15, m[at[6]], m[at[7]]);
    mix(v, 0, 5, 10, 15, m[at[8]], m[at[9]]);
    mix(v, 1, 6, 11, 12, m[at[10]], m[at[11]]);
    mix(v, 2, 7, 8, 13, m[at[12]], m[at[13]]);
    mix(v, 3, 4, 9, 14, m[at[14]], m[at[15]]);
  }

  template <int... Round>
  static inline __attribute__((always_inline)) void rounds(uint64_t* v, const uint64_t* m, std::integer_sequence<int, Round...>) {
    (round<Round>(v, m), ...);
  }

  // `count` is how many bytes of the text there are up to the end of this block.
  static void compress(uint64_t* state, const unsigned char* block, uint64_t count, bool is_last) {
    uint64_t m[16], v[16];
    std::memcpy(m, block, kBlock);  // little-endian, as every machine that this is built for
    std::memcpy(v, state, 8 * sizeof *v);
    std::memcpy(v + 8, kStart, sizeof kStart);
    v[12] ^= count;
    if (is_last) v[14] = ~v[14];
    rounds(v, m, std::make_integer_sequence<int, 12>{});
    for (int i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
  }
};

// Texts one behind the other; text i ends before ends[i].
inline void digests(const unsigned char* texts, const int64_t* ends, int64_t count, uint64_t* out) {
  int64_t begin = 0;
  for (int64_t i = 0; i < count; begin = ends[i++]) {
    out[i] = Blake2b64::of(texts + begin, static_cast<uint64_t>(ends[i] - begin));
  }
}

}  // namespace lapilli
