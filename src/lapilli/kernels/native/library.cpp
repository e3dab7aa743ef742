// Entry points (plain C, called through ctypes) and the choice of the instruction set.
#include <sched.h>

#include <cstdlib>
#include <cstring>

#include "abi.h"
#include "digest.h"
#include "pool.h"
#include "store.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(LAPILLI_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(LAPILLI_ARM) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lapilli {

Parallel g_parallel = nullptr;

namespace {

constexpr uint64_t kRound = uint64_t{1} << 40;  // of Team::cursor_
constexpr int kPatience = 4000;                 // looks at nothing new before others get the core

thread_local Team* t_team = nullptr;

// A short wait inside a loop that looks again and again.
class Wait {
 public:
  void once() {
    if (++count_ > kPatience) {
      sched_yield();
      return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

 private:
  int count_ = 0;
};

}  // namespace

Team* Team::of_this_thread() { return t_team; }

void Team::run(int64_t threads, void (*work)(void*), void* data) {
  struct Call {
    Team team;
    void (*work)(void*);
    void* data;
    Team** caller;  // a thread knows itself by the place of its own variable
  } call{Team(threads), work, data, &t_team};
  g_parallel(
      [](void* raw) {
        Call& c = *static_cast<Call*>(raw);
        if (&t_team != c.caller) return c.team.help();
        t_team = &c.team;
        c.work(c.data);
        t_team = nullptr;
        c.team.close();
      },
      &call, static_cast<unsigned>(threads), 0);
}

void Team::share(int64_t count, int64_t least, Piece piece, const void* body) {
  // Closed first: a helper that is late with the last round must not take its end for a piece of this one.
  const uint64_t round = cursor_.load(std::memory_order_relaxed) / kRound;
  cursor_.store(round * kRound + (kRound - 1), std::memory_order_relaxed);
  count_.store(count, std::memory_order_release);
  least_.store(least, std::memory_order_relaxed);
  piece_.store(piece, std::memory_order_relaxed);
  body_.store(body, std::memory_order_relaxed);
  done_.store(0, std::memory_order_relaxed);
  cursor_.store((round + 1) * kRound, std::memory_order_release);
  while (take()) {
  }
  for (Wait wait; done_.load(std::memory_order_acquire) < count;) wait.once();
}

bool Team::take() {
  uint64_t seen = cursor_.load(std::memory_order_acquire);
  for (;;) {
    const int64_t begin = static_cast<int64_t>(seen % kRound), left = count_.load(std::memory_order_acquire) - begin;
    if (left <= 0) return false;
    const int64_t least = least_.load(std::memory_order_relaxed), part = left / (2 * threads_);
    const int64_t wanted = part > least ? part : least, size = wanted < left ? wanted : left;
    const Piece piece = piece_.load(std::memory_order_relaxed);
    const void* body = body_.load(std::memory_order_relaxed);
    const uint64_t next = seen + static_cast<uint64_t>(size);
    if (cursor_.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_acquire)) {
      piece(body, begin, begin + size);
      done_.fetch_add(size, std::memory_order_release);
      return true;
    }
  }
}

void Team::help() {
  for (Wait wait; !closed_.load(std::memory_order_acquire);) {
    if (take()) {
      wait = Wait();
    } else {
      wait.once();
    }
  }
}

void Team::close() { closed_.store(true, std::memory_order_release); }

namespace {

constexpr int64_t kKeep = 8 << 20;  // scratch above this is given back after a call

#if defined(LAPILLI_AMX)
// Whether the CPU has tiles of bytes and the kernel lets this process use them, which it has to be asked.
bool may_use_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux, and the state of the tiles
  constexpr unsigned kTiles = 1u << 24, kTileBytes = 1u << 25;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kTileBytes);
  return has && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

bool supported(const Table* table) {
#if defined(__x86_64__)
  if (table == &kPortable) return true;
#if defined(LAPILLI_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  if (table == &kAvx2) return avx2 && f16c;
  if (table == &kAvxVnni) {
    a = 0;
    return avx2 && f16c && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
  }
  if (table == &kAvx512) {
    return avx2 && f16c && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  }
#if defined(LAPILLI_AMX)
  if (table == &kAmx) return supported(&kAvx512) && __builtin_cpu_supports("avx512bf16") && may_use_tiles();
#endif
#endif
  return false;
#elif defined(LAPILLI_ARM)
  if (table != &kNeonDot) return true;  // every AArch64 CPU has NEON
#if defined(__APPLE__)
  return true;  // every Mac with an Arm CPU has sdot
#elif defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return false;
#endif
#else
  return table == &kPortable;
#endif
}

const Table* const kTables[] = {
#if defined(LAPILLI_AMX)
    &kAmx,
#endif
#if defined(LAPILLI_X86)
    &kAvx512, &kAvxVnni, &kAvx2,
#elif defined(LAPILLI_ARM)
    &kNeonDot, &kNeon,
#endif
    &kPortable,
};

const Table* g_table = nullptr;

// Whether the layer of a tower may use products of bfloat16.
bool has_pairs() {
#if defined(LAPILLI_AMX)
  if (g_table == &kAmx) return true;
#endif
#if defined(LAPILLI_X86)
  return g_table == &kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace

uint8_t* Scratch::get(int64_t bytes) {
  if (bytes > size_) {
    release();
    size_ = (bytes + 4095) / 4096 * 4096;
    memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>(size_)));
    if (memory_ == nullptr) std::abort();
  }
  return memory_;
}

void Scratch::trim() {
  if (size_ > kKeep) release();
}

void Scratch::release() {
  std::free(memory_);
  memory_ = nullptr;
  size_ = 0;
}

}  // namespace lapilli

extern "C" {

__attribute__((visibility("default"))) int lapilli_abi() { return lapilli::kAbi; }

// The name of the instruction set in use: the best one, or the one asked for; null when this
// machine or this build does not have it.
__attribute__((visibility("default"))) const char* lapilli_select(const char* name) {
  using namespace lapilli;
  for (const Table* table : kTables) {
    if (name != nullptr && *name != '\0' && std::strcmp(name, table->name) != 0) continue;
    if (!supported(table)) continue;
    g_table = table;
    return table->name;
  }
  return nullptr;
}

__attribute__((visibility("default"))) void lapilli_use_pool(void* parallel) {
  lapilli::g_parallel = reinterpret_cast<lapilli::Parallel>(parallel);
}

// Up to eight weights that are packed alike, met by the same activations.
__attribute__((visibility("default"))) void lapilli_linear(
    const lapilli::Weights* const* weights, float* const* y, int64_t count, const float* x, int64_t tokens,
    int64_t x_stride, int64_t threads, int64_t weight_only) {
  lapilli::LinearCall calls[8];
  for (int64_t i = 0; i < count; ++i) {
    calls[i] = {*weights[i], x, y[i], tokens, x_stride, weights[i]->rows, threads, weight_only};
  }
  lapilli::g_table->linear(calls, count);
}

__attribute__((visibility("default"))) void lapilli_store(const lapilli::StoreCall* call) {
  lapilli::store(*call);
}

__attribute__((visibility("default"))) void lapilli_layer(const lapilli::LayerCall* call) {
  lapilli::g_table->layer(*call);
}

__attribute__((visibility("default"))) void lapilli_step(const lapilli::StepCall* call, const lapilli::LayerCall* layers) {
  lapilli::g_table->step(*call, layers);
}

__attribute__((visibility("default"))) void lapilli_round_levels(const lapilli::RoundCall* call) {
  lapilli::g_table->round_levels(*call);
}

__attribute__((visibility("default"))) void lapilli_tower(const lapilli::TowerCall* call) {
  using namespace lapilli;
#if defined(LAPILLI_X86)
  if (g_table == &kAvx512 && has_pairs()) return tower_avx512bf16(*call);
#endif
  g_table->tower(*call);
}

// 1: a layer of a tower multiplies bfloat16 as it is; 0: as float32.
__attribute__((visibility("default"))) int lapilli_has_pairs() { return lapilli::has_pairs(); }

__attribute__((visibility("default"))) void lapilli_dense(const lapilli::DenseCall* call) {
  lapilli::g_table->dense(*call);
}

__attribute__((visibility("default"))) void lapilli_attention(const lapilli::AttentionCall* call) {
  lapilli::g_table->attention(*call);
}

__attribute__((visibility("default"))) void lapilli_prefill(const lapilli::PrefillCall* call) {
  lapilli::g_table->prefill(*call);
}

__attribute__((visibility("default"))) void lapilli_rms_norm(const lapilli::RowsCall* call) {
  lapilli::g_table->rms_norm(*call);
}

__attribute__((visibility("default"))) void lapilli_silu_mul(const lapilli::RowsCall* call) {
  lapilli::g_table->silu_mul(*call);
}

__attribute__((visibility("default"))) void lapilli_gelu_mul(const lapilli::RowsCall* call) {
  lapilli::g_table->gelu_mul(*call);
}

__attribute__((visibility("default"))) void lapilli_digests(const unsigned char* texts, const int64_t* ends,
                                                           int64_t count, uint64_t* out) {
  lapilli::digests(texts, ends, count, out);
}

__attribute__((visibility("default"))) void lapilli_rotate(const lapilli::RotateCall* call) {
  lapilli::g_table->rotate(*call);
}
}
