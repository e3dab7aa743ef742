// Attention of one and of many new positions, against the formula in float64.
#include "driver.h"

namespace driver {
namespace {

constexpr double kLimit = 3e-6;
constexpr float kUntouched = 12345.0f;

// softmax(scale q k - slope distance) v of one query over positions begin..end; key(s) and value(s)
// point at the elements of position s.
template <class Key, class Value>
Doubles attend(const double* q, int64_t width, int64_t begin, int64_t end, double scale, double slope, int64_t at,
               const Key& key, const Value& value) {
  Doubles scores;
  for (int64_t s = begin; s < end; ++s) {
    const double* k = key(s);
    double dot = 0;
    for (int64_t i = 0; i < width; ++i) dot += q[i] * k[i];
    scores.push_back(dot * scale - slope * static_cast<double>(at - s));
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  double total = 0;
  for (double& score : scores) total += score = std::exp(score - top);
  Doubles out(static_cast<size_t>(width), 0.0);
  for (int64_t s = begin; s < end; ++s) {
    const double* v = value(s);
    for (int64_t i = 0; i < width; ++i) out[static_cast<size_t>(i)] += scores[static_cast<size_t>(s - begin)] / total * v[i];
  }
  return out;
}

// A cache [blocks, heads, size, width] in one format, and what its numbers are. Block 0, which no
// table names, holds NaN.
struct Cache {
  Floats floats, scales;
  std::vector<uint16_t> bfloats;
  std::vector<int8_t> bytes;
  Doubles exact;

  Cache(int64_t kind, int64_t positions, int64_t unused, int64_t width, Random& random)
      : floats(random.normals(positions * width)) {
    for (int64_t p = 0; p < positions; ++p) {
      if (kind == lapilli::kInt8) scales.push_back(p < unused ? NAN : 0.01f + 0.001f * std::fabs(random.normal()));
      for (int64_t i = 0; i < width; ++i) {
        float& x = floats[static_cast<size_t>(p * width + i)];
        if (kind == lapilli::kInt8) {
          bytes.push_back(static_cast<int8_t>(random.integer(-128, 127)));
          exact.push_back(static_cast<double>(bytes.back()) * static_cast<double>(scales.back()));
          continue;
        }
        if (p < unused) x = NAN;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if (kind == lapilli::kBfloat16) bits &= 0xffff0000;
        bfloats.push_back(static_cast<uint16_t>(bits >> 16));
        std::memcpy(&x, &bits, 4);
        exact.push_back(static_cast<double>(x));
      }
    }
  }
  const void* data(int64_t kind) const {
    if (kind == lapilli::kInt8) return bytes.data();
    if (kind == lapilli::kBfloat16) return bfloats.data();
    return floats.data();
  }
};

Floats slopes_of(bool wanted, int64_t heads, Random& random) {
  Floats slopes;
  for (int64_t h = 0; wanted && h < heads; ++h) slopes.push_back(std::fabs(random.normal()));
  return slopes;
}

// Tables of shuffled blocks for rows of these lengths; block 0 fills them up.
std::vector<int32_t> make_table(const std::vector<int32_t>& lengths, int64_t size, int64_t stride, Random& random) {
  std::vector<int32_t> table(lengths.size() * static_cast<size_t>(stride), 0), order;
  for (size_t b = 0; b < lengths.size(); ++b) {
    for (int64_t i = 0; i * size < lengths[b]; ++i) order.push_back(static_cast<int32_t>(order.size()) + 1);
  }
  for (size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[static_cast<size_t>(random.integer(0, static_cast<int64_t>(i) - 1))]);
  }
  for (size_t b = 0; b < lengths.size(); ++b) {
    for (int64_t i = 0; i * size < lengths[b]; ++i) {
      table[b * static_cast<size_t>(stride) + static_cast<size_t>(i)] = order.back();
      order.pop_back();
    }
  }
  return table;
}

void check_decode(const Library& library, Report& report, lapilli::AttentionCall call, bool alibi, Random& random) {
  std::vector<int32_t> lengths;
  int64_t blocks = 1, stride = 1;
  for (int64_t b = 0; b < call.rows; ++b) {
    lengths.push_back(static_cast<int32_t>(random.integer(1, 90)));
    const int64_t used = (lengths.back() + call.block_size - 1) / call.block_size;
    blocks += used;
    stride = std::max(stride, used);
  }
  const std::vector<int32_t> table = make_table(lengths, call.block_size, stride, random);
  const int64_t unused = call.kv_heads * call.block_size;
  const Cache keys(call.kind, blocks * unused, unused, call.width, random);
  const Cache values(call.kind, blocks * unused, unused, call.width, random);
  const Floats q = random.normals(call.rows * call.heads * call.width);
  const Floats slopes = slopes_of(alibi, call.heads, random);
  Floats out(q.size() + 1, kUntouched);
  call.q = q.data();
  call.keys = keys.data(call.kind);
  call.values = values.data(call.kind);
  call.key_scales = keys.scales.data();
  call.value_scales = values.scales.data();
  call.table = table.data();
  call.lengths = lengths.data();
  call.slopes = alibi ? slopes.data() : nullptr;
  call.out = out.data();
  call.table_stride = stride;
  call.head_stride = call.block_size * call.width;
  call.block_stride = call.kv_heads * call.head_stride;
  call.scale = 1 / std::sqrt(static_cast<double>(call.width));
  library.attention(&call);

  const Doubles wide(q.begin(), q.end());
  Doubles expected;
  for (int64_t b = 0; b < call.rows; ++b) {
    const int64_t end = lengths[static_cast<size_t>(b)];
    const int64_t begin = call.window > 0 ? std::max<int64_t>(0, end - call.window) : 0;
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t head = h / (call.heads / call.kv_heads);
      const auto place = [&](int64_t s) {
        const int64_t block = table[static_cast<size_t>(b * stride + s / call.block_size)];
        return block * call.block_stride + head * call.head_stride + s % call.block_size * call.width;
      };
      const Doubles one = attend(
          wide.data() + (b * call.heads + h) * call.width, call.width, begin, end, call.scale,
          alibi ? static_cast<double>(slopes[static_cast<size_t>(h)]) : 0.0, end - 1,
          [&](int64_t s) { return keys.exact.data() + place(s); },
          [&](int64_t s) { return values.exact.data() + place(s); });
      expected.insert(expected.end(), one.begin(), one.end());
    }
  }
  report.require("attention", out.back() == kUntouched, "writes beyond its rows");
  report.compare("attention", kLimit, out, expected,
                 name("kind", call.kind, "rows", call.rows, "heads", call.heads, "kv_heads", call.kv_heads,
                      "block_size", call.block_size, "width", call.width, "window", call.window, "alibi",
                      int64_t{alibi}, "threads", call.threads));
}

// Strides of [batch, heads, positions, width]: heads first, or joined as one product leaves them.
void lay(bool joined, int64_t heads, int64_t positions, int64_t width, int64_t& row, int64_t& head,
         int64_t& position) {
  row = heads * positions * width;
  head = joined ? width : positions * width;
  position = joined ? heads * width : width;
}

void check_many(const Library& library, Report& report, lapilli::PrefillCall call, bool joined, bool alibi,
                Random& random) {
  const int64_t heads = call.heads, width = call.width;
  lay(joined, heads, call.queries, width, call.q_row, call.q_head, call.q_position);
  lay(joined, call.kv_heads, call.positions, width, call.k_row, call.k_head, call.k_position);
  lay(!joined, call.kv_heads, call.positions, width, call.v_row, call.v_head, call.v_position);
  lay(true, heads + 1, call.queries, width, call.out_row, call.out_head, call.out_position);  // one head of gap
  const Floats q = random.normals(call.batch * call.q_row);
  const Floats k = random.normals(call.batch * call.k_row), v = random.normals(call.batch * call.v_row);
  const Floats slopes = slopes_of(alibi, heads, random);
  Floats out(static_cast<size_t>(call.batch * call.out_row), kUntouched);
  call.q = q.data();
  call.keys = k.data();
  call.values = v.data();
  call.slopes = alibi ? slopes.data() : nullptr;
  call.out = out.data();
  call.scale = 1 / std::sqrt(static_cast<double>(width));
  library.prefill(&call);

  const Doubles wide_q(q.begin(), q.end()), wide_k(k.begin(), k.end()), wide_v(v.begin(), v.end());
  Doubles expected(out.size(), static_cast<double>(kUntouched));
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t head = h / (heads / call.kv_heads);
      for (int64_t t = 0; t < call.queries; ++t) {
        const int64_t at = call.positions - call.queries + t, end = call.causal ? at + 1 : call.positions;
        const int64_t begin = call.window > 0 ? std::max<int64_t>(0, at + 1 - call.window) : 0;
        const Doubles one = attend(
            wide_q.data() + b * call.q_row + h * call.q_head + t * call.q_position, width, begin, end, call.scale,
            alibi ? static_cast<double>(slopes[static_cast<size_t>(h)]) : 0.0, at,
            [&](int64_t s) { return wide_k.data() + b * call.k_row + head * call.k_head + s * call.k_position; },
            [&](int64_t s) { return wide_v.data() + b * call.v_row + head * call.v_head + s * call.v_position; });
        std::copy(one.begin(), one.end(),
                  expected.begin() + b * call.out_row + h * call.out_head + t * call.out_position);
      }
    }
  }
  const std::string what =
      name("batch", call.batch, "heads", heads, "kv_heads", call.kv_heads, "queries", call.queries, "positions",
           call.positions, "width", width, "causal", call.causal, "window", call.window, "joined", int64_t{joined},
           "alibi", int64_t{alibi}, "threads", call.threads);
  bool untouched = true;
  for (size_t i = 0; i < out.size(); ++i) {
    if (expected[i] != static_cast<double>(kUntouched)) continue;
    untouched = untouched && out[i] == kUntouched;
    out[i] = 0;
    expected[i] = 0;
  }
  report.require("prefill", untouched, "writes beyond its heads, " + what);
  report.compare("prefill", kLimit, out, expected, what);
}

// Scores of 0, 100, 200, ...: the last position that a query sees takes all. Then a key of NaN: it
// reaches whoever sees it and no one else.
void check_unusual(const Library& library, Report& report, Random& random) {
  constexpr int64_t width = 16, positions = 40, strange = 27;
  const Floats v = random.normals(positions * width);
  Floats q(v.size(), 0.0f), k(v.size(), 0.0f), one(width), many(v.size());
  for (size_t s = 0; s < positions; ++s) {
    q[s * width] = 100;
    k[s * width] = static_cast<float>(s);
  }
  const int32_t table = 0, length = positions;
  lapilli::AttentionCall decode{};
  decode.q = q.data();
  decode.keys = k.data();
  decode.values = v.data();
  decode.table = &table;
  decode.lengths = &length;
  decode.out = one.data();
  decode.rows = decode.heads = decode.kv_heads = decode.table_stride = decode.threads = 1;
  decode.block_size = positions;
  decode.width = width;
  decode.block_stride = decode.head_stride = positions * width;
  decode.scale = 1;
  library.attention(&decode);
  report.compare("attention", kLimit, one, Doubles(v.end() - width, v.end()), "large scores");

  lapilli::PrefillCall prefill{};
  prefill.q = q.data();
  prefill.keys = k.data();
  prefill.values = v.data();
  prefill.out = many.data();
  prefill.batch = prefill.heads = prefill.kv_heads = prefill.causal = prefill.threads = 1;
  prefill.queries = prefill.positions = positions;
  prefill.width = width;
  prefill.q_position = prefill.k_position = prefill.v_position = prefill.out_position = width;
  prefill.scale = 1;
  library.prefill(&prefill);
  report.compare("prefill", kLimit, many, Doubles(v.begin(), v.end()), "large scores");

  k[strange * width + 3] = NAN;
  library.attention(&decode);
  library.prefill(&prefill);
  const auto finite = [](float x) { return std::isfinite(x); };
  report.require("attention", std::none_of(one.begin(), one.end(), finite), "a key of NaN");
  const auto from = many.begin() + strange * width;
  report.require("prefill", std::all_of(many.begin(), from, finite), "a key of NaN that is not seen");
  report.require("prefill", std::none_of(from, many.end(), finite), "a key of NaN that is seen");
}

}  // namespace

void check_attention(const Library& library, Report& report) {
  Random random(2);
  check_unusual(library, report, random);
  const int64_t heads[][2] = {{1, 1}, {2, 1}, {3, 3}, {8, 2}, {10, 2}, {9, 1}};
  const int64_t sizes[] = {1, 7, 16, 32, 100}, widths[] = {16, 32, 64, 80, 112, 128}, windows[] = {0, 0, 1, 20};
  for (const int64_t kind : {lapilli::kFloat32, lapilli::kBfloat16, lapilli::kInt8}) {
    for (int i = 0; i < 30; ++i) {
      lapilli::AttentionCall call{};
      call.kind = kind;
      call.rows = random.integer(1, 4);
      call.heads = heads[i % 6][0];
      call.kv_heads = heads[i % 6][1];
      call.block_size = sizes[random.integer(0, 4)];
      call.width = widths[random.integer(0, 5)];
      call.window = windows[random.integer(0, 3)];
      call.threads = random.integer(1, 3);
      check_decode(library, report, call, random.integer(0, 1) == 1, random);
    }
  }
  report.finish("attention");
}

void check_prefill(const Library& library, Report& report) {
  Random random(3);
  const int64_t heads[][2] = {{1, 1}, {2, 1}, {3, 3}, {8, 2}, {7, 1}}, pasts[] = {0, 1, 5, 64, 130};
  const int64_t widths[] = {16, 32, 64, 80, 112, 128}, windows[] = {0, 0, 1, 20, 100};
  for (int i = 0; i < 40; ++i) {
    lapilli::PrefillCall call{};
    call.batch = random.integer(1, 2);
    call.heads = heads[i % 5][0];
    call.kv_heads = heads[i % 5][1];
    call.queries = i % 4 ? random.integer(1, 70) : 24 * random.integer(1, 2);
    call.positions = call.queries + pasts[random.integer(0, 4)];
    call.width = widths[random.integer(0, 5)];
    call.causal = i % 3 != 0;
    call.window = call.causal ? windows[random.integer(0, 4)] : 0;
    call.threads = random.integer(1, 3);
    check_many(library, report, call, i % 2 == 1, call.causal && random.integer(0, 1) == 1, random);
  }
  report.finish("prefill");
}

}  // namespace driver
