// What the checks of driver.cpp share: the library's entry points, random numbers, the worst
// difference. Knows no instruction set.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "abi.h"

namespace driver {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

// The functions of library.cpp, found by name as Python finds them.
struct Library {
  int (*abi)();
  const char* (*select)(const char*);
  void (*use_pool)(void*);
  void (*linear)(const lapilli::Weights* const*, float* const*, int64_t, const float*, int64_t, int64_t, int64_t, int64_t);
  void (*dense)(const lapilli::DenseCall*);
  void (*attention)(const lapilli::AttentionCall*);
  void (*prefill)(const lapilli::PrefillCall*);
  void (*rms_norm)(const lapilli::RowsCall*);
  void (*silu_mul)(const lapilli::RowsCall*);
  void (*gelu_mul)(const lapilli::RowsCall*);
  void (*rotate)(const lapilli::RotateCall*);
  void (*tower)(const lapilli::TowerCall*);
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  Floats normals(int64_t count) {
    Floats out(static_cast<size_t>(count));
    for (float& x : out) x = normal();
    return out;
  }

 private:
  std::mt19937 engine_;
};

// The worst difference of every operation, relative to the largest number that was expected.
class Report {
 public:
  void compare(const char* operation, double limit, const Floats& found, const Doubles& expected,
               const std::string& what) {
    double size = 1e-6, worst = 0;
    for (const double x : expected) size = std::max(size, std::fabs(x));
    for (size_t i = 0; i < expected.size(); ++i) {
      const double difference = std::fabs(static_cast<double>(found[i]) - expected[i]) / size;
      if (!(difference <= worst)) worst = difference;  // NaN too
    }
    note(operation, limit, worst, what);
  }
  void require(const char* operation, bool holds, const std::string& what) {
    note(operation, 0.5, holds ? 0.0 : 1.0, what);
  }
  void finish(const char* operation) {
    std::printf("%-10s %4d cases, worst difference %.2e (limit %.0e)\n", operation, cases_, worst_, limit_);
    cases_ = 0;
    worst_ = 0;
  }
  bool failed() const { return failed_; }

 private:
  void note(const char* operation, double limit, double worst, const std::string& what) {
    ++cases_;
    if (!(worst <= limit)) {
      std::printf("%s: %s: difference %g, limit %g\n", operation, what.c_str(), worst, limit);
      failed_ = true;
    } else if (limit < 0.5) {
      worst_ = std::max(worst_, worst);
      limit_ = limit;
    }
  }
  int cases_ = 0;
  double worst_ = 0;
  double limit_ = 0;
  bool failed_ = false;
};

// Says in a message what was computed: name("tokens", 3, "inputs", 64) -> "tokens 3 inputs 64".
inline std::string name() { return ""; }
template <class... Rest>
std::string name(const char* key, int64_t value, Rest... rest) {
  return std::string(key) + " " + std::to_string(value) + " " + name(rest...);
}

void check_linear(const Library& library, Report& report);
void check_dense(const Library& library, Report& report);
void check_attention(const Library& library, Report& report);
void check_prefill(const Library& library, Report& report);
void check_fused(const Library& library, Report& report);
void check_tower(const Library& library, Report& report);

}  // namespace driver
