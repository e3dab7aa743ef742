// Threads: torch's own OpenMP pool, never a second one beside it. Its GOMP_parallel is handed over
// at run time (lapilli_use_pool), so the library links against no OpenMP and any compiler will do.
#pragma once

#include <atomic>
#include <cstdint>

namespace lapilli {

using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern Parallel g_parallel;

// body(begin, end) over 0..count in pieces of `step`, whichever thread comes first; the caller works
// too, and one thread suffices: a nested or smaller team only means fewer hands.
template <class Body>
void for_pieces(int64_t threads, int64_t count, int64_t step, const Body& body) {
  if (threads <= 1 || g_parallel == nullptr || count <= step) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next;
    int64_t count, step;
    const Body* body;
  } shared{{0}, count, step, &body};
  g_parallel(
      [](void* raw) {
        Shared& s = *static_cast<Shared*>(raw);
        for (;;) {
          const int64_t begin = s.next.fetch_add(s.step, std::memory_order_relaxed);
          if (begin >= s.count) return;
          const int64_t end = begin + s.step < s.count ? begin + s.step : s.count;
          (*s.body)(begin, end);
        }
      },
      &shared, static_cast<unsigned>(threads), 0);
}

// Memory of the calling thread that grows and stays, 64-byte aligned; large sizes are given back.
// Every caller has its own slot, since a thread that waits in a parallel region also works in it.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }
  uint8_t* get(int64_t bytes);
  void trim();

 private:
  void release();
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace lapilli
