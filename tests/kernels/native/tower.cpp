// A layer of a tower in every number format, against its formula in float64.
#include "driver.h"

namespace driver {
namespace {

constexpr float kUntouched = 12345.0f;
constexpr int64_t kTiles = 2, kPositions = 37, kHeads = 2, kInner = 208;

// The nearest bfloat16 below or above, whichever is no further.
uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float widen(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// A linear layer in a number format, and the weights that it stands for.
struct Linear {
  lapilli::Product product{};
  lapilli::Weights packed{};
  std::vector<uint8_t> bytes;
  std::vector<uint16_t> halves;
  Floats scales, bias, weight;

  Linear(int64_t kind, int64_t rows, int64_t inputs, Random& random)
      : bias(random.normals(rows)), weight(random.normals(rows * inputs)) {
    const float size = 1.5f / std::sqrt(static_cast<float>(inputs));
    for (float& w : weight) w *= size;
    product.rows = rows;
    product.inputs = product.stride = inputs;
    product.kind = kind;
    product.bias = bias.data();
    product.plain = weight.data();
    if (kind == lapilli::kBfloat16) {
      for (float& w : weight) {
        halves.push_back(narrow(w));
        w = widen(halves.back());
      }
      product.plain = halves.data();
    }
    if (kind == lapilli::kInt8) pack(rows, inputs);
  }
  Linear(const Linear&) = delete;

  void pack(int64_t rows, int64_t inputs) {
    packed.rows = rows;
    packed.inputs = inputs;
    packed.group = 32;
    packed.bits = 8;
    bytes.assign(static_cast<size_t>(packed.blocks() * packed.block_bytes()), 128);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = &weight[static_cast<size_t>(r * inputs)];
      float most = 0;
      for (int64_t k = 0; k < inputs; ++k) most = std::max(most, std::fabs(row[k]));
      const float scale = most / 127;
      scales.push_back(scale);
      for (int64_t k = 0; k < inputs; ++k) {
        const int q = static_cast<int>(std::lrint(row[k] / scale));
        row[k] = static_cast<float>(q) * scale;
        bytes[static_cast<size_t>(r / 16 * packed.block_bytes() + (k / 4 * 16 + r % 16) * 4 + k % 4)] =
            static_cast<uint8_t>(q + 128);
      }
    }
    packed.data = bytes.data();
    packed.row_scales = scales.data();
    packed.bias = bias.data();
    product.packed = &packed;
  }

  Doubles operator()(const Doubles& x) const {
    const int64_t inputs = product.inputs, tokens = static_cast<int64_t>(x.size()) / inputs;
    Doubles y;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = 0; r < product.rows; ++r) {
        double sum = static_cast<double>(bias[static_cast<size_t>(r)]);
        for (int64_t k = 0; k < inputs; ++k) {
          sum += static_cast<double>(weight[static_cast<size_t>(r * inputs + k)]) * x[static_cast<size_t>(t * inputs + k)];
        }
        y.push_back(sum);
      }
    }
    return y;
  }
};

Doubles norm(const Doubles& x, const Floats& weight, const Floats& bias) {
  const size_t width = weight.size();
  Doubles y(x.size());
  for (size_t row = 0; row < x.size(); row += width) {
    double mean = 0, squares = 0;
    for (size_t i = 0; i < width; ++i) mean += x[row + i] / static_cast<double>(width);
    for (size_t i = 0; i < width; ++i) squares += (x[row + i] - mean) * (x[row + i] - mean);
    const double root = std::sqrt(squares / static_cast<double>(width) + 1e-5);
    for (size_t i = 0; i < width; ++i) {
      y[row + i] = (x[row + i] - mean) / root * static_cast<double>(weight[i]) + static_cast<double>(bias[i]);
    }
  }
  return y;
}

Doubles attend(const Doubles& q, const Doubles& k, const Doubles& v, int64_t width) {
  Doubles out(q.size(), 0.0);
  const int64_t row = kHeads * width;
  for (int64_t at = 0; at < kTiles * kPositions * kHeads; ++at) {
    const int64_t query = at / kHeads, head = at % kHeads * width, first = query / kPositions * kPositions;
    Doubles shares;
    double total = 0;
    for (int64_t s = first; s < first + kPositions; ++s) {
      double score = 0;
      for (int64_t d = head; d < head + width; ++d) {
        score += q[static_cast<size_t>(query * row + d)] * k[static_cast<size_t>(s * row + d)];
      }
      shares.push_back(std::exp(score / std::sqrt(static_cast<double>(width))));
      total += shares.back();
    }
    for (int64_t s = 0; s < kPositions; ++s) {
      for (int64_t d = head; d < head + width; ++d) {
        out[static_cast<size_t>(query * row + d)] +=
            shares[static_cast<size_t>(s)] / total * v[static_cast<size_t>((first + s) * row + d)];
      }
    }
  }
  return out;
}

double activate(double x, int64_t activation) {
  if (activation == lapilli::kQuickGelu) return x / (1 + std::exp(-1.702 * x));
  if (activation == lapilli::kGelu) return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
  return x / (1 + std::exp(-2 * 0.7978845608028654 * (x + 0.044715 * x * x * x)));
}

void check_layer(const Library& library, Report& report, int64_t kind, int64_t width, int64_t activation, double limit,
                 Random& random) {
  const int64_t hidden = kHeads * width, count = kTiles * kPositions * hidden;
  const Floats x = random.normals(count), w1 = random.normals(hidden), b1 = random.normals(hidden);
  const Floats w2 = random.normals(hidden), b2 = random.normals(hidden);
  const Linear q(kind, hidden, hidden, random), k(kind, hidden, hidden, random), v(kind, hidden, hidden, random);
  const Linear out(kind, hidden, hidden, random), fc1(kind, kInner, hidden, random), fc2(kind, hidden, kInner, random);
  Floats y(static_cast<size_t>(count + 1), kUntouched);
  const lapilli::TowerCall call{w1.data(), b1.data(), w2.data(), b2.data(), &q.product, &k.product, &v.product,
                                &out.product, &fc1.product, &fc2.product, x.data(), y.data(), kTiles, kPositions,
                                kHeads, width, kind, activation, 2, 1 / std::sqrt(static_cast<double>(width)), 1e-5};
  library.tower(&call);
  Doubles expected(x.begin(), x.end());
  const Doubles normed = norm(expected, w1, b1), mixed = out(attend(q(normed), k(normed), v(normed), width));
  for (size_t i = 0; i < mixed.size(); ++i) expected[i] += mixed[i];
  Doubles inner = fc1(norm(expected, w2, b2));
  for (double& one : inner) one = activate(one, activation);
  const Doubles added = fc2(inner);
  for (size_t i = 0; i < added.size(); ++i) expected[i] += added[i];
  report.require("tower", y.back() == kUntouched, "writes beyond its rows");
  report.compare("tower", limit, y, expected, name("kind", kind, "width", width, "activation", activation));
}

}  // namespace

void check_tower(const Library& library, Report& report) {
  Random random(6);
  for (const int64_t width : {16, 48, 64}) {
    for (const int64_t activation : {lapilli::kQuickGelu, lapilli::kGeluTanh, lapilli::kGelu}) {
      check_layer(library, report, lapilli::kFloat32, width, activation, 3e-6, random);
    }
  }
  report.finish("tower");
  for (const int64_t width : {32, 64}) {
    check_layer(library, report, lapilli::kBfloat16, width, lapilli::kQuickGelu, 0.03, random);
    check_layer(library, report, lapilli::kInt8, width, lapilli::kQuickGelu, 0.03, random);
  }
  report.finish("tower, rounded");
}

}  // namespace driver
