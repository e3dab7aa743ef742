// Threads: torch's own OpenMP pool, never a second one beside it. Its GOMP_parallel is handed over
// at run time (lapilli_use_pool), so the library links against no OpenMP and any compiler will do.
#pragma once

#include <atomic>
#include <cstdint>

namespace lapilli {

using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern Parallel g_parallel;

// A thread that hands out work, and others that help it. A piece is taken by whoever comes first, the
// handing thread too, so one thread suffices: a nested or smaller team only means fewer hands. Pieces get
// smaller towards the end, so that all are done at about the same time.
class Team {
 public:
  using Piece = void (*)(const void* body, int64_t begin, int64_t end);

  // The team of the calling thread, which hands out work in it; null outside of `run`.
  static Team* of_this_thread();

  // work(data) on the calling thread, with up to `threads` - 1 others that wait for pieces meanwhile: what
  // is handed out inside costs a fraction of what it costs to call them anew.
  static void run(int64_t threads, void (*work)(void*), void* data);

  explicit Team(int64_t threads) : threads_(threads) {}

  // piece(body, begin, end) over 0..count, in pieces of at least `least`; returns when all are done.
  void share(int64_t count, int64_t least, Piece piece, const void* body);

  void help();   // takes pieces until `close`
  void close();  // sends the helpers home

 private:
  bool take();  // one piece, if there is one

  // Round in the upper bits, next item in the lower 40. Who has read a round's fields and then finds this as
  // it was may take a piece: fields change only when all pieces are taken and this is closed.
  std::atomic<uint64_t> cursor_{0};
  std::atomic<int64_t> done_{0};  // items of this round
  std::atomic<int64_t> count_{0};
  std::atomic<int64_t> least_{1};
  std::atomic<Piece> piece_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<bool> closed_{false};
  const int64_t threads_;
};

// body(begin, end) over 0..count in pieces of at least `least` items.
template <class Body>
void for_pieces(int64_t threads, int64_t count, int64_t least, const Body& body) {
  if (threads <= 1 || g_parallel == nullptr || count <= least) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  const Team::Piece piece = [](const void* raw, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(raw))(begin, end);
  };
  if (Team* team = Team::of_this_thread()) return team->share(count, least, piece, &body);
  struct Work {
    int64_t count, least;
    Team::Piece piece;
    const Body* body;
  } work{count, least, piece, &body};
  Team::run(
      threads,
      [](void* raw) {
        const Work& w = *static_cast<const Work*>(raw);
        Team::of_this_thread()->share(w.count, w.least, w.piece, w.body);
      },
      &work);
}

// work() with the helpers standing by.
template <class Work>
void with_team(int64_t threads, const Work& work) {
  if (threads <= 1 || g_parallel == nullptr || Team::of_this_thread() != nullptr) return work();
  Team::run(
      threads, [](void* raw) { (*static_cast<const Work*>(raw))(); }, const_cast<Work*>(&work));
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
