// The small operations, against their formulas in float64.
#include "driver.h"

namespace driver {
namespace {

constexpr double kLimit = 1e-6;
constexpr float kUntouched = 12345.0f;

void check_norm(const Library& library, Report& report, int64_t rows, int64_t width, Random& random,
                double offset = 0.0) {
  const int64_t stride = width + 5;
  const Floats x = random.normals(rows * stride), weight = random.normals(width);
  Floats y(static_cast<size_t>(rows * width + 1), kUntouched);
  const lapilli::RowsCall call{x.data(), weight.data(), y.data(), rows, width, stride, 2, 1e-5, offset};
  library.rms_norm(&call);
  Doubles expected;
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += std::pow(static_cast<double>(x[static_cast<size_t>(r * stride + i)]), 2);
    const double root = std::sqrt(squares / static_cast<double>(width) + 1e-5);
    for (int64_t i = 0; i < width; ++i) {
      expected.push_back(static_cast<double>(x[static_cast<size_t>(r * stride + i)]) / root *
                         (offset + static_cast<double>(weight[static_cast<size_t>(i)])));
    }
  }
  report.require("rms_norm", y.back() == kUntouched, "writes beyond its rows");
  report.compare("rms_norm", kLimit, y, expected, name("rows", rows, "width", width));
}

void check_gate(const Library& library, Report& report, int64_t count, Random& random) {
  Floats gate = random.normals(count);
  for (size_t i = 0; i < gate.size(); i += 3) gate[i] *= 40;  // beyond the range of exp in float32
  const Floats up = random.normals(count);
  Floats y(static_cast<size_t>(count + 1), kUntouched);
  const lapilli::RowsCall call{gate.data(), up.data(), y.data(), 1, count, count, 2, 0.0, 0.0};
  library.silu_mul(&call);
  for (size_t i = 0; i < gate.size(); ++i) {  // each by its own size: large numbers hide nothing
    const double x = static_cast<double>(gate[i]);
    const double expected = x / (1 + std::exp(-x)) * static_cast<double>(up[i]);
    report.compare("silu_mul", kLimit, {y[i]}, {expected}, "gate " + std::to_string(x));
  }
  report.require("silu_mul", y.back() == kUntouched, "writes beyond its elements");

  std::fill(y.begin(), y.end(), kUntouched);
  library.gelu_mul(&call);
  for (size_t i = 0; i < gate.size(); ++i) {
    const double x = static_cast<double>(gate[i]), u = std::sqrt(2 / 3.141592653589793) * (x + 0.044715 * x * x * x);
    const double expected = 0.5 * x * (1 + std::tanh(u)) * static_cast<double>(up[i]);
    report.compare("gelu_mul", kLimit, {y[i]}, {expected}, "gate " + std::to_string(x));
  }
  report.require("gelu_mul", y.back() == kUntouched, "writes beyond its elements");

  const Floats strange{NAN, INFINITY, 0.0f, NAN, INFINITY, 0.0f, NAN, INFINITY, 0.0f, NAN, INFINITY, 0.0f, NAN,
                       INFINITY, 0.0f, NAN},
      ones(16, 1.0f);
  Floats out(16);
  const lapilli::RowsCall rest{strange.data(), ones.data(), out.data(), 1, 16, 16, 1, 0.0, 0.0};
  library.silu_mul(&rest);
  for (size_t i = 0; i < 16; ++i) {
    const bool same = std::isnan(strange[i]) ? std::isnan(out[i]) : out[i] == strange[i];
    report.require("silu_mul", same, "silu of " + std::to_string(strange[i]));
  }
}

void check_rotation(const Library& library, Report& report, int64_t rows, int64_t heads, int64_t positions,
                    int64_t width, Random& random) {
  const int64_t count = rows * heads * positions * width, half = width / 2;
  const Floats x = random.normals(count), cosine = random.normals(rows * positions * width);
  const Floats sine = random.normals(rows * positions * width);
  Floats y(static_cast<size_t>(count + 1), kUntouched);
  lapilli::RotateCall call{};  // x as [row, position, head], y as [row, head, position]
  call.x = x.data();
  call.cosine = cosine.data();
  call.sine = sine.data();
  call.y = y.data();
  call.rows = rows;
  call.heads = heads;
  call.positions = positions;
  call.width = width;
  call.x_row = call.y_row = heads * positions * width;
  call.x_head = width;
  call.x_position = heads * width;
  call.y_head = positions * width;
  call.y_position = width;
  call.threads = 3;
  library.rotate(&call);
  Doubles expected;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t t = 0; t < positions; ++t) {
        const float* from = x.data() + b * call.x_row + h * call.x_head + t * call.x_position;
        const int64_t angle = (b * positions + t) * width;
        for (int64_t i = 0; i < width; ++i) {
          const double c = static_cast<double>(cosine[static_cast<size_t>(angle + i)]);
          const double s = static_cast<double>(sine[static_cast<size_t>(angle + i)]);
          expected.push_back(static_cast<double>(from[i]) * c + static_cast<double>(from[(i + half) % width]) * s);
        }
      }
    }
  }
  report.require("rotate", y.back() == kUntouched, "writes beyond its elements");
  report.compare("rotate", kLimit, y, expected,
                 name("rows", rows, "heads", heads, "positions", positions, "width", width));
}

}  // namespace

void check_fused(const Library& library, Report& report) {
  Random random(4);
  for (const int64_t width : {1, 3, 4, 15, 16, 17, 64, 77, 300}) check_norm(library, report, 3, width, random);
  for (const int64_t width : {1, 17, 300}) check_norm(library, report, 3, width, random, 1.0);
  report.finish("rms_norm");
  for (const int64_t count : {1, 3, 4, 7, 16, 33, 1000}) check_gate(library, report, count, random);
  report.finish("silu_mul");
  report.finish("gelu_mul");
  for (const int64_t width : {32, 64, 96, 128}) check_rotation(library, report, 2, 3, 5, width, random);
  report.finish("rotate");
}

}  // namespace driver
