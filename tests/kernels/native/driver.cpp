// Every operation of one instruction set of the compiled kernels against float64, without Python: so
// that a build for another CPU can be checked under an emulator.
//
//   driver LIBRARY               prints the instruction set that the library chooses on this CPU
//   driver LIBRARY NAME          0: all differences small; 1: not; 2: not this library; 77: NAME is
//                                not in this library, or not for this CPU
#include "driver.h"

namespace driver {
namespace {

template <class Function>
void find(void* handle, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  if (function == nullptr) {
    std::fprintf(stderr, "the library has no %s\n", symbol);
    std::exit(2);
  }
}

Library open(const char* path) {
  void* handle = dlopen(path, RTLD_NOW);
  if (handle == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(2);
  }
  Library library{};
  find(handle, "lapilli_abi", library.abi);
  if (library.abi() != lapilli::kAbi) {
    std::fprintf(stderr, "the library was built from other sources: version %d, expected %d\n", library.abi(),
                 lapilli::kAbi);
    std::exit(2);
  }
  find(handle, "lapilli_select", library.select);
  find(handle, "lapilli_use_pool", library.use_pool);
  find(handle, "lapilli_linear", library.linear);
  find(handle, "lapilli_dense", library.dense);
  find(handle, "lapilli_attention", library.attention);
  find(handle, "lapilli_prefill", library.prefill);
  find(handle, "lapilli_rms_norm", library.rms_norm);
  find(handle, "lapilli_silu_mul", library.silu_mul);
  find(handle, "lapilli_gelu_mul", library.gelu_mul);
  find(handle, "lapilli_rotate", library.rotate);
  find(handle, "lapilli_tower", library.tower);
  return library;
}

// Stands in for the GOMP_parallel of torch's OpenMP.
void parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> team;
  for (unsigned i = 1; i < threads; ++i) team.emplace_back(body, data);
  body(data);
  for (std::thread& hand : team) hand.join();
}

int run(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "driver LIBRARY [NAME]\n");
    return 2;
  }
  const Library library = open(arguments[1]);
  const char* chosen = library.select(count > 2 ? arguments[2] : "");
  if (chosen == nullptr) return 77;
  if (count == 2) {
    std::printf("%s\n", chosen);
    return 0;
  }
  library.use_pool(reinterpret_cast<void*>(&parallel));
  Report report;
  check_linear(library, report);
  check_dense(library, report);
  check_attention(library, report);
  check_prefill(library, report);
  check_fused(library, report);
  check_tower(library, report);
  return report.failed() ? 1 : 0;
}

}  // namespace
}  // namespace driver

int main(int count, char** arguments) { return driver::run(count, arguments); }
