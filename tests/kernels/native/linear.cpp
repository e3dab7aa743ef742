// Packed weights times activations, against the same integers in float64.
#include "driver.h"

namespace driver {
namespace {

constexpr double kLimit = 3e-6;
constexpr float kUntouched = 12345.0f;
constexpr int64_t kGap = 3;  // floats between two rows of y

double half(uint16_t bits) {
  const int exponent = bits >> 10;
  const double mantissa = bits & 1023;
  return exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
}

struct Shape {
  int64_t bits, rows, inputs, group;
  bool zeros, bias, nonlinear = false;
};

// A random layer, packed as abi.h draws it and plain.
struct Layer {
  lapilli::Weights packed{};
  std::vector<uint8_t> data, zeros;
  std::vector<int8_t> span_scales;
  std::vector<uint16_t> half_scales;
  Floats row_scales, bias;
  std::vector<int> integers;  // [rows, inputs], zero point taken off, or levels times scales of spans
  Doubles scales;             // [rows, groups]

  Layer(const Shape& shape, bool extreme, Random& random) {
    packed.rows = shape.rows;
    packed.inputs = shape.inputs;
    packed.group = shape.group;
    packed.bits = shape.bits;
    data.assign(static_cast<size_t>(packed.blocks() * packed.block_bytes()), shape.bits == 8 ? 128 : 0x88);
    make_scales(shape, random);
    if (shape.nonlinear) make_spans(extreme, random);
    integers.resize(static_cast<size_t>(shape.rows * shape.inputs));
    for (int64_t r = 0; r < shape.rows; ++r) {
      for (int64_t k = 0; k < shape.inputs; ++k) {
        const int64_t low = shape.bits == 8 ? 1 : 0, high = shape.bits == 8 ? 255 : 15;
        const int64_t value = extreme ? (random.integer(0, 1) ? high : low) : random.integer(low, high);
        put(r, k, static_cast<uint8_t>(value));
        integers[static_cast<size_t>(r * shape.inputs + k)] = weight_of(static_cast<int>(value), r, k);
      }
    }
    if (shape.bias) {
      bias = random.normals(packed.blocks() * lapilli::kBlock);
      packed.bias = bias.data();
    }
    packed.data = data.data();
  }

  size_t fact(int64_t row, int64_t group) const {
    return static_cast<size_t>((row / 16 * packed.groups() + group) * 16 + row % 16);
  }
  int zero_of(int64_t row, int64_t k) const {
    if (packed.bits == 8) return 128;
    return zeros.empty() ? 8 : zeros[fact(row, k / packed.group)];
  }
  int weight_of(int value, int64_t row, int64_t k) const {
    if (span_scales.empty()) return value - zero_of(row, k);
    const size_t span = static_cast<size_t>((row / 16 * packed.spans() + k / lapilli::kSpan) * 16 + row % 16);
    return lapilli::kLevels[value] * span_scales[span];
  }
  double scale_of(int64_t row, int64_t group) const {
    if (!row_scales.empty()) return static_cast<double>(row_scales[static_cast<size_t>(row)]);
    return half(half_scales[fact(row, group)]);
  }

 private:
  void make_spans(bool extreme, Random& random) {
    span_scales.resize(static_cast<size_t>(packed.blocks() * packed.spans() * lapilli::kBlock));
    for (int8_t& x : span_scales) {
      x = static_cast<int8_t>(extreme ? (random.integer(0, 1) ? 127 : -127) : random.integer(-127, 127));
    }
    packed.span_scales = span_scales.data();
  }
  void make_scales(const Shape& shape, Random& random) {
    const int64_t padded_rows = packed.blocks() * lapilli::kBlock;
    if (shape.bits == 8 || shape.nonlinear) {
      row_scales.resize(static_cast<size_t>(padded_rows));
      for (float& x : row_scales) x = std::fabs(random.normal()) / 100;
      packed.row_scales = row_scales.data();
      return;
    }
    half_scales.resize(static_cast<size_t>(padded_rows * packed.groups()));
    for (uint16_t& x : half_scales) x = static_cast<uint16_t>(random.integer(0, 20 << 10));  // subnormal too
    packed.half_scales = half_scales.data();
    if (!shape.zeros) return;
    zeros.resize(half_scales.size());
    for (uint8_t& x : zeros) x = static_cast<uint8_t>(random.integer(0, 15));
    packed.zeros = zeros.data();
  }
  void put(int64_t row, int64_t k, uint8_t value) {
    const int64_t inputs = packed.bits == 8 ? 4 : 8;  // of 64 bytes
    const int64_t step = row / 16 * (packed.padded() / inputs) + k / inputs;
    uint8_t& byte = data[static_cast<size_t>((step * 16 + row % 16) * 4 + k % 4)];
    if (packed.bits == 8) {
      byte = value;
    } else {
      byte = static_cast<uint8_t>(k % 8 < 4 ? (byte & 0xf0) | value : (byte & 0x0f) | (value << 4));
    }
  }
};

// One row of activations as the kernels see it: rounded by group as quantize_group, or as it is.
Doubles seen(const float* x, const lapilli::Weights& w, bool weight_only) {
  Doubles out(x, x + w.inputs);
  if (weight_only) return out;
  for (int64_t begin = 0; begin < w.inputs; begin += w.group) {
    const int64_t end = std::min(begin + w.group, w.inputs);
    float largest = 0;
    for (int64_t k = begin; k < end; ++k) largest = std::max(largest, std::fabs(x[k]));
    const float factor = largest < 1e-30f ? 0.0f : 127.0f / largest, scale = largest / 127.0f;
    for (int64_t k = begin; k < end; ++k) {
      const float scaled = x[k] * factor;
      out[static_cast<size_t>(k)] = static_cast<double>(std::nearbyint(scaled)) * static_cast<double>(scale);
    }
  }
  return out;
}

Doubles expected(const Layer& layer, const Floats& x, int64_t tokens, bool weight_only) {
  const lapilli::Weights& w = layer.packed;
  Doubles out;
  for (int64_t t = 0; t < tokens; ++t) {
    const Doubles row = seen(x.data() + t * w.inputs, w, weight_only);
    for (int64_t r = 0; r < w.rows; ++r) {
      double total = layer.bias.empty() ? 0.0 : static_cast<double>(layer.bias[static_cast<size_t>(r)]);
      for (int64_t begin = 0; begin < w.inputs; begin += w.group) {
        double sum = 0;
        for (int64_t k = begin; k < std::min(begin + w.group, w.inputs); ++k) {
          sum += row[static_cast<size_t>(k)] * layer.integers[static_cast<size_t>(r * w.inputs + k)];
        }
        total += sum * layer.scale_of(r, begin / w.group);
      }
      out.push_back(total);
    }
  }
  return out;
}

// The library's product, the weight met twice in one call; what lies behind y has to stay as it was.
Floats product(const Library& library, const Layer& layer, const Floats& x, int64_t tokens, bool weight_only,
               Report& report) {
  const size_t size = static_cast<size_t>(tokens * layer.packed.rows);
  Floats out;
  for (const int64_t threads : {1, 3}) {
    Floats here(size + kGap, kUntouched), again(size + kGap, kUntouched);
    const lapilli::Weights* weights[] = {&layer.packed, &layer.packed};
    float* const targets[] = {here.data(), again.data()};
    library.linear(weights, targets, 2, x.data(), tokens, layer.packed.inputs, threads, weight_only);
    bool untouched = true;
    for (size_t i = size; i < here.size(); ++i) {
      untouched = untouched && here[i] == kUntouched && again[i] == kUntouched;
    }
    here.resize(size);
    again.resize(size);
    report.require("linear", std::memcmp(here.data(), again.data(), size * sizeof(float)) == 0, "both results equal");
    report.require("linear", untouched, "writes beyond its rows");
    if (threads > 1) {
      const bool same = std::memcmp(here.data(), out.data(), here.size() * sizeof(float)) == 0;
      report.require("linear", same, "three threads equal one");
    }
    out = here;
  }
  return out;
}

void check_shape(const Library& library, Report& report, const Shape& shape, int64_t tokens, bool weight_only,
                 Random& random) {
  const bool extreme = random.integer(0, 3) == 0;
  const Layer layer(shape, extreme, random);
  Floats x = random.normals(tokens * shape.inputs);
  if (extreme) {
    for (float& value : x) value = value < 0 ? -1.0f : 1.0f;
  }
  const Floats y = product(library, layer, x, tokens, weight_only, report);
  report.compare("linear", kLimit, y, expected(layer, x, tokens, weight_only),
                 name("bits", shape.bits, "rows", shape.rows, "inputs", shape.inputs, "group", shape.group, "zeros",
                      int64_t{shape.zeros}, "nonlinear", int64_t{shape.nonlinear}, "bias", int64_t{shape.bias}, "tokens", tokens,
                      "weight_only", int64_t{weight_only}, "extreme", int64_t{extreme}));
}

// NaN and infinity reach every output of their row and no other row; zeros give the bias.
void check_unusual(const Library& library, Report& report, const Shape& shape, bool weight_only, Random& random) {
  const Layer layer(shape, false, random);
  Floats x(static_cast<size_t>(4 * shape.inputs), 0.0f);
  x[5] = NAN;
  x[static_cast<size_t>(shape.inputs) + 7] = INFINITY;
  for (int64_t k = 0; k < shape.inputs; ++k) x[static_cast<size_t>(3 * shape.inputs + k)] = 1e-38f;
  const Floats y = product(library, layer, x, 4, weight_only, report);
  bool spread = true, zero = true;
  for (size_t r = 0; r < static_cast<size_t>(shape.rows); ++r) {
    const size_t rows = static_cast<size_t>(shape.rows);
    spread = spread && !std::isfinite(y[r]);
    if (!weight_only) spread = spread && !std::isfinite(y[rows + r]);
    zero = zero && y[2 * rows + r] == 0.0f && (weight_only || y[3 * rows + r] == 0.0f);
  }
  report.require("linear", spread, name("NaN and infinity, bits", shape.bits, "weight_only", int64_t{weight_only}));
  report.require("linear", zero, name("zeros, bits", shape.bits, "weight_only", int64_t{weight_only}));
}

}  // namespace

void check_linear(const Library& library, Report& report) {
  Random random(1);
  const int64_t many[] = {12, 23, 24, 25, 41, 49};
  for (const int64_t group : {32, 64, 128}) {
    for (const int kind : {0, 1, 2, 3}) {
      for (const bool weight_only : {false, true}) {
        const Shape plain{kind == 0 ? 8 : 4, 20, 96, group, kind == 2, false, kind == 3};
        check_unusual(library, report, plain, weight_only, random);
        for (int i = 0; i < 12; ++i) {
          Shape shape = plain;
          shape.rows = i % 4 ? random.integer(1, 80) : 16 * random.integer(1, 4);
          shape.inputs = i % 3 ? random.integer(1, 300) : 32 * random.integer(1, 9);
          shape.bias = random.integer(0, 1) == 1;
          const int64_t tokens = i < 8 ? i + 1 : many[random.integer(0, 5)];
          check_shape(library, report, shape, tokens, weight_only, random);
        }
      }
    }
  }
  report.finish("linear");
}

}  // namespace driver
