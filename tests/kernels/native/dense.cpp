// Plain weights times few tokens, against float64.
#include "driver.h"

namespace driver {
namespace {

constexpr double kLimit = 3e-6;
constexpr float kUntouched = 12345.0f;

void check_shape(const Library& library, Report& report, lapilli::DenseCall call, bool bias, Random& random) {
  call.w_stride = call.inputs + 2;
  call.x_stride = call.inputs + 1;
  call.y_stride = call.rows + 3;
  Floats w = random.normals(call.rows * call.w_stride);
  std::vector<uint16_t> bfloats;
  for (float& value : w) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bfloats.push_back(static_cast<uint16_t>(bits >> 16));
    if (call.kind == lapilli::kBfloat16) bits &= 0xffff0000;
    std::memcpy(&value, &bits, 4);
  }
  const Floats x = random.normals(call.tokens * call.x_stride), offset = random.normals(call.rows);
  Floats y(static_cast<size_t>(call.tokens * call.y_stride), kUntouched);
  call.w = call.kind == lapilli::kBfloat16 ? static_cast<const void*>(bfloats.data()) : w.data();
  call.x = x.data();
  call.bias = bias ? offset.data() : nullptr;
  call.y = y.data();
  library.dense(&call);

  Floats found;
  Doubles expected;
  bool untouched = true;
  for (int64_t t = 0; t < call.tokens; ++t) {
    for (int64_t r = 0; r < call.y_stride; ++r) {
      const float here = y[static_cast<size_t>(t * call.y_stride + r)];
      if (r >= call.rows) {
        untouched = untouched && here == kUntouched;
        continue;
      }
      double sum = bias ? static_cast<double>(offset[static_cast<size_t>(r)]) : 0.0;
      for (int64_t k = 0; k < call.inputs; ++k) {
        sum += static_cast<double>(w[static_cast<size_t>(r * call.w_stride + k)]) *
               static_cast<double>(x[static_cast<size_t>(t * call.x_stride + k)]);
      }
      found.push_back(here);
      expected.push_back(sum);
    }
  }
  report.require("dense", untouched, "writes beyond its rows");
  report.compare("dense", kLimit, found, expected,
                 name("kind", call.kind, "rows", call.rows, "inputs", call.inputs, "tokens", call.tokens, "bias",
                      int64_t{bias}, "threads", call.threads));
}

}  // namespace

void check_dense(const Library& library, Report& report) {
  Random random(5);
  for (const int64_t kind : {lapilli::kFloat32, lapilli::kBfloat16}) {
    for (int i = 0; i < 40; ++i) {
      lapilli::DenseCall call{};
      call.kind = kind;
      call.rows = random.integer(1, 40);
      call.inputs = i % 4 ? random.integer(1, 300) : 16 * random.integer(1, 9);
      call.tokens = random.integer(1, 9);
      call.threads = random.integer(1, 3);
      check_shape(library, report, call, random.integer(0, 1) == 1, random);
    }
  }
  report.finish("dense");
}

}  // namespace driver
