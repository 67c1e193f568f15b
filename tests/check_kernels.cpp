// The kernels of cpp_kernels.cpp without PyTorch's library: random shapes against sums in double, with one to four
// threads that must agree in every bit. For CPUs that are emulated, and for sanitizers; test_check_kernels.py builds it.
//
//     check_kernels [trials]        prints the instruction sets that it tried; the exit status is 1 if a kernel is wrong

#include <cstdio>
#include <cstdlib>
#include <random>

#define QWEN_KERNELS_ONLY
#include QWEN_SOURCE

namespace {

using namespace qwen_kernels;

std::mt19937 engine(0);
int failures = 0;

int64_t pick(std::initializer_list<int64_t> from) { return from.begin()[engine() % from.size()]; }
float normal() { return std::normal_distribution<float>()(engine); }
float rounded(float x, bool bf16) { return bf16 ? static_cast<float>(BFloat16(x)) : x; }

// Numbers in float or BFloat16, in memory of exactly their size.
struct Numbers {
  std::vector<float> values;
  std::vector<char> memory;
  bool bf16;

  Numbers(int64_t n, bool bf16, float scale = 1) : values(n), memory(n * (bf16 ? 2 : 4)), bf16(bf16) {
    for (int64_t i = 0; i < n; ++i) set(i, scale * normal());
  }
  void set(int64_t i, float x) {
    values[i] = rounded(x, bf16);
    const BFloat16 half = values[i];
    std::memcpy(memory.data() + i * (bf16 ? 2 : 4), bf16 ? static_cast<const void*>(&half) : &values[i], bf16 ? 2 : 4);
  }
  float written(int64_t i) const {
    if (!bf16) return reinterpret_cast<const float*>(memory.data())[i];
    return reinterpret_cast<const BFloat16*>(memory.data())[i];
  }
  void* data() { return memory.data(); }
  double operator[](int64_t i) const { return values[i]; }
};

void fail(const char* what, int64_t i, double found, double expected) {
  if (++failures <= 20)
    std::printf("%s %s: number %lld is %.9g, not %.9g\n", levels()[level].name, what, static_cast<long long>(i), found, expected);
}

// y are the expected but for sums in float and, if bf16, one rounding.
void close(const char* what, const Numbers& y, const std::vector<double>& expected, double tolerance = 4e-6) {
  double largest = 1;
  for (double e : expected) largest = std::max(largest, std::fabs(e));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double e = expected[i], found = y.written(i);
    if (!(std::fabs(found - e) <= tolerance * largest + (y.bf16 ? std::fabs(e) / 256 : 0))) fail(what, i, found, e);
  }
}

// f(begin, end) for pieces of 0 ... n, with each number of threads; y is the same in every bit.
template <class F>
void run(const char* what, int64_t n, int64_t piece, std::vector<char>& y, const F& f) {
  std::vector<char> first;
  const std::vector<char> before = y;
  for (threads = 1; threads <= 4; ++threads) {
    y = before;
    Team::share(n, piece, f);
    if (threads == 1) first = y;
    if (y != first) fail(what, -1, threads, 1);
  }
}

void check_linear() {
  const bool int8 = engine() % 2, bf16 = engine() % 2, bias = engine() % 2, whole = int8 && bf16 && engine() % 2;
  const bool own = levels()[level].linear_bf16 && bf16 && (whole ? engine() % 2 : !int8);
  const auto product = own ? levels()[level].linear_bf16 : kernels().linear;
  Linear a{};
  a.rows = 1 + engine() % 8, a.groups = pick({1, 1, 4});
  a.in = (whole ? pick({128, 256, 640}) : pick({1, 3, 16, 31, 32, 33, 64, 100, 257, 1031})) * a.groups;
  a.out = pick({1, 2, 3, 8, 17, 70});
  a.weight_stride = a.in + pick({0, 1, 3}), a.bf16_out = whole ? engine() % 2 : bf16;
  int64_t padded = 1;
  while (padded < a.rows) padded *= 2;
  Numbers x(padded * a.in, whole || own), w(a.out * a.weight_stride, true), y(a.rows * a.out, a.bf16_out);
  for (int64_t i = 0; i < padded * a.in; ++i) x.set(i, rounded(x[i], bf16));
  std::vector<int8_t> codes(w.values.size());
  std::vector<float> scale(a.out * a.groups);
  Numbers b(a.out, engine() % 2);
  for (auto& c : codes) c = static_cast<int8_t>(engine());
  for (auto& s : scale) s = normal() / 64;
  a.x = x.data(), a.weight = int8 ? static_cast<void*>(codes.data()) : w.data(), a.y = y.data();
  a.scale = int8 ? scale.data() : nullptr, a.bias = bias ? b.data() : nullptr, a.bf16_bias = b.bf16;
  std::vector<int16_t> numbers(whole ? padded * a.in : 0);
  std::vector<float> steps(whole ? padded * (a.in / SEGMENT) : 0);
  if (whole) {
    const bool largest = engine() % 4 == 0;
    for (int64_t i = 0; largest && i < padded * a.in; ++i) x.set(i, -255 / 128.f);
    for (size_t i = 0; largest && i < codes.size(); ++i) codes[i] = -128;
    kernels().whole_steps(static_cast<BFloat16*>(x.data()), a, numbers.data(), steps.data());
    a.x = nullptr, a.numbers = numbers.data(), a.steps = steps.data();
    for (int64_t first = 0; first < padded * a.in; first += SEGMENT) {  // from here on x is what is left of it
      int exponent;
      double most = 0;
      for (int64_t i = first; i < first + SEGMENT; ++i) most = std::max(most, std::fabs(x[i]));
      std::frexp(most, &exponent);
      const double step = std::ldexp(1, exponent - 15);
      for (int64_t i = first; i < first + SEGMENT; ++i) x.values[i] = std::nearbyint(x[i] / step) * step;
    }
  }
  const char* name = whole ? "linear, whole steps" : "linear";
  run(name, (a.out + 1) / 2, pick({1, 4}), y.memory,
      [&](int64_t begin, int64_t end) { product(a, int8, 2 * begin, std::min(a.out, 2 * end)); });
  std::vector<double> expected(a.rows * a.out);
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t o = 0; o < a.out; ++o) {
      double sum = bias ? b[o] : 0;
      for (int64_t i = 0; i < a.in; ++i) {
        const int64_t at = o * a.weight_stride + i;
        sum += x[r * a.in + i] * (int8 ? codes[at] * static_cast<double>(scale[o * a.groups + i / (a.in / a.groups)]) : w[at]);
      }
      expected[r * a.out + o] = sum;
    }
  close(name, y, expected);
  if (!int8) return;
  Numbers widened(a.out * a.in, bf16);
  a.widened = widened.data();
  run("widen", a.out, pick({1, 4}), widened.memory,
      [&](int64_t begin, int64_t end) { kernels().widen(a, bf16, begin, end); });
  std::vector<double> matrix(a.out * a.in);
  for (int64_t i = 0; i < a.out * a.in; ++i)
    matrix[i] = codes[i / a.in * a.weight_stride + i % a.in] *
                static_cast<double>(scale[i / a.in * a.groups + i % a.in / (a.in / a.groups)]);
  close("widen", widened, matrix);
}

double half(uint16_t h) {  // of normal numbers
  return std::ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25) * (h >> 15 ? -1 : 1);
}

// by_output: the codes of an output lie side by side, and x is in fixed point.
void check_gptq(bool by_output) {
  Gptq a{};
  a.bits = pick({4, 8}), a.zero_offset = pick({0, 1}), a.rows = 1 + engine() % 8;
  const int n = 32 / a.bits, mask = (1 << a.bits) - 1;
  const bool any_order = !by_output && engine() % 3 == 0;
  a.in = by_output ? 128 * pick({1, 2, 6}) : n * pick({1, 4, 16, 48}), a.out = 8 * pick({1, 2, 5, 9, 16, 17, 90});
  a.group_size = by_output ? pick({32, 64, 128, 256, 1024}) : n * pick({1, 4, 16, 40});
  a.groups = (a.in + a.group_size - 1) / a.group_size;
  int64_t padded = 1;
  while (padded < a.rows) padded *= 2;
  Numbers x(padded * a.in, false), y(padded * a.out, false);
  std::fill(y.memory.begin(), y.memory.end(), 0);
  std::vector<int32_t> qweight(a.in / n * a.out), qzeros(a.groups * (a.out / n)), order(a.in);
  std::vector<uint16_t> scales(a.groups * a.out);
  for (auto& q : qweight) q = engine();
  for (auto& q : qzeros) q = engine();
  for (auto& s : scales) s = (engine() % 2 << 15) | (8 + engine() % 8) << 10 | engine() % 1024;
  for (int64_t i = 0; i < a.in; ++i) order[i] = any_order ? engine() % a.groups : i / a.group_size;
  std::vector<float> sums;
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t g = 0; g < a.in; g += a.group_size)
      for (int64_t i = g, end = std::min(a.in, g + a.group_size); i < end; i += SEGMENT) {
        double sum = 0;
        for (int64_t j = i; j < std::min(end, i + SEGMENT); ++j) sum += x[r * a.in + j];
        sums.push_back(sum);
      }
  a.x = static_cast<float*>(x.data()), a.y = static_cast<float*>(y.data()), a.sums = sums.data();
  a.qweight = qweight.data(), a.qzeros = qzeros.data(), a.scales = scales.data();
  a.g_idx = any_order ? order.data() : nullptr;
  a.qweight_stride = a.out, a.qweight_column = 1, a.qzeros_stride = a.out / n, a.scales_stride = a.out;
  auto product = kernels().gptq;
  std::vector<int32_t> turned(qweight.size());
  std::vector<int8_t> digits(padded * a.in * 3);
  std::vector<float> steps(padded * a.in / SEGMENT), totals(padded * a.in / part_of(a.group_size));
  if (by_output) {
    product = levels()[level].gptq_vnni && engine() % 2 ? levels()[level].gptq_vnni : kernels().gptq_by_output;
    for (int64_t i = 0; i < a.in / n; ++i)
      for (int64_t o = 0; o < a.out; ++o) turned[o * (a.in / n) + i] = qweight[i * a.out + o];
    a.qweight = turned.data(), a.qweight_stride = 1, a.qweight_column = a.in / n, a.places = pick({2, 3});
    for (int64_t r = 0; r < padded; ++r)
      kernels().fixed_point(a.x + r * a.in, a, digits.data() + r * a.in * a.places, steps.data() + r * (a.in / SEGMENT),
                            totals.data() + r * (a.in / part_of(a.group_size)));
    a.digits = digits.data(), a.steps = steps.data(), a.sums = totals.data();
  }
  const char* name = by_output ? "gptq by output" : "gptq";
  run(name, (a.out + 63) / 64, 1, y.memory,
      [&](int64_t begin, int64_t end) { product(a, begin * 64, std::min(a.out, end * 64)); });
  Numbers whole(padded * a.out, false);
  std::fill(whole.memory.begin(), whole.memory.end(), 0);
  a.y = static_cast<float*>(whole.data());
  product(a, 0, a.out);
  if (whole.memory != y.memory) fail("gptq, in one piece", -1, 0, 1);
  const bool bf16 = engine() % 2;
  Numbers weight(a.in * a.out, bf16);
  a.weight = weight.data();
  run("dequantize", a.out, pick({7, 64}), weight.memory,
      [&](int64_t begin, int64_t end) { kernels().dequantize(a, bf16, begin, end); });
  std::vector<double> expected(a.rows * a.out), matrix(a.in * a.out);
  for (int64_t i = 0; i < a.in; ++i)
    for (int64_t o = 0; o < a.out; ++o) {
      const int64_t g = order[i];
      const int code = qweight[i / n * a.out + o] >> (i % n * a.bits) & mask;
      const int zero = (qzeros[g * (a.out / n) + o / n] >> (o % n * a.bits) & mask) + a.zero_offset & mask;
      const double w = matrix[o * a.in + i] = half(scales[g * a.out + o]) * (code - zero);
      for (int64_t r = 0; r < a.rows; ++r) expected[r * a.out + o] += w * x[r * a.in + i];
    }
  // Codes and zeros are added up apart: the error is that of their sums, which are larger than their difference.
  // Two places round x to 2^-16 of its segment's largest.
  close(name, y, expected, by_output && a.places == 2 ? 2e-4 : 3e-5);
  close("dequantize", weight, matrix);
}

void hadamard(double* x, int64_t hd) {
  const int64_t block = hd & -hd;
  std::vector<double> y(x, x + hd);
  for (int64_t i = 0; i < hd; ++i) {
    double sum = 0;
    for (int64_t j = i / block * block; j < (i / block + 1) * block; ++j)
      sum += __builtin_popcountll((i % block) & (j % block)) % 2 ? -y[j] : y[j];
    x[i] = sum / std::sqrt(static_cast<double>(block));
  }
}

// Keys or values (B, nh, S, hd), stored in one of the ways.
struct Stored {
  std::vector<double> values;
  Numbers plain;
  std::vector<uint8_t> codes, params;
  Store where{};

  Stored(int64_t B, int64_t nh, int64_t S, int64_t hd, Kind kind)
      : values(B * nh * S * hd), plain(kind >= INT8 ? 0 : values.size(), kind == BF16) {
    const int64_t rows = B * nh * S;
    if (kind < INT8) {
      values.assign(plain.values.begin(), plain.values.end());
      const int64_t n = hd * (kind == BF16 ? 2 : 4);
      where = {plain.memory.data(), plain.memory.data(), nh * S * n, S * n, n};
      return;
    }
    const int64_t G = hd / GROUP, width = kind == INT4 ? hd / 2 : hd, extra = kind == INT4 ? 2 + G / 2 + (G + 7) / 8 : 4;
    codes.resize(rows * width), params.resize(rows * extra);
    where = {reinterpret_cast<char*>(codes.data()), reinterpret_cast<char*>(params.data()), nh * S * width, S * width, width,
             nh * S * extra, S * extra, extra};
    const bool bf16 = engine() % 2;
    Numbers x(values.size(), bf16);
    Append a{x.data(), nh * S * hd, S * hd, hd, codes.data(), params.data(), nh * S * width, S * width, width,
             nh * S * extra, S * extra, extra, nh, S, hd};
    std::vector<char> both(codes.size() + params.size());
    run("append", rows, 3, both, [&](int64_t begin, int64_t end) {
      kernels(kind == INT4 ? G : 0).append(a, bf16, kind == INT4, begin, end);
      for (int64_t i = begin; i < end; ++i) {  // threads write to `both`, so that it is compared
        std::memcpy(both.data() + i * width, codes.data() + i * width, width);
        std::memcpy(both.data() + codes.size() + i * extra, params.data() + i * extra, extra);
      }
    });
    double errors = 0, squares = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const uint8_t *c = codes.data() + row * width, *p = params.data() + row * extra;
      BFloat16 first, second;
      std::memcpy(&first, p, 2), std::memcpy(&second, p + 2, 2);
      double* y = values.data() + row * hd;
      for (int64_t i = 0; i < hd; ++i) {
        if (kind == INT8) {
          y[i] = static_cast<double>(first) * static_cast<int8_t>(c[i]) + static_cast<double>(second);
          continue;
        }
        const int64_t g = i % G;
        const int choice = p[2 + g / 2] >> (g % 2 * 4) & 15, last = p[2 + G / 2 + g / 8] >> (g % 8) & 1;
        const int code = i < hd / 2 ? c[i] & 15 : c[i - hd / 2] >> 4;
        y[i] = static_cast<double>(first) * STEPS[choice >> 2] * (code - 7.5 + CENTRES[last * 4 + (choice & 3)]);
      }
      hadamard(y, hd);
      for (int64_t i = 0; i < hd; ++i) {
        const double exact = x[row * hd + i];
        errors += (y[i] - exact) * (y[i] - exact), squares += exact * exact;
      }
    }
    const double error = std::sqrt(errors / squares);
    if (!(error < (kind == INT8 ? 0.012 : 0.09))) fail("append", kind, error, 0);
  }
};

void check_attention() {
  const Kind kind = static_cast<Kind>(engine() % 4);
  Attention a{};
  a.B = 1 + engine() % 2, a.nh = 1 + engine() % 3, a.T = pick({1, 1, 2, 5}), a.S = pick({5, 63, 64, 65, 150, 300});
  a.hd = kind == INT4 ? pick({16, 32, 80, 128, 256}) : pick({32, 40, 64, 80, 128}), a.splits = 1 + engine() % 3;
  a.causal = engine() % 2;
  const Stored keys(a.B, a.nh, a.S, a.hd, kind), values(a.B, a.nh, a.S, a.hd, kind);
  const int64_t heads = a.B * a.nh;
  Numbers q(heads * a.T * a.hd, engine() % 2), y(heads * a.T * a.hd, engine() % 2);
  std::vector<char> mask(a.B * a.S), partial(heads * a.splits * a.T * (a.hd + 2) * sizeof(float));
  for (auto& m : mask) m = engine() % 4 > 0;
  for (int64_t i = 0; i < a.S; ++i) mask[i] = a.B == 1 && mask[i];  // of two rows the first sees nothing
  const bool masked = engine() % 2;
  a.q = q.data(), a.q_bf16 = q.bf16, a.q_batch = a.nh * a.T * a.hd, a.q_head = a.T * a.hd, a.q_token = a.hd;
  a.scaling = .2f, a.k = keys.where, a.v = values.where;
  a.partial = reinterpret_cast<float*>(partial.data());
  if (masked) a.mask = reinterpret_cast<bool*>(mask.data()), a.mask_strides[0] = a.S, a.mask_strides[3] = 1;
  y.bf16 ? a.out_bf16 = static_cast<BFloat16*>(y.data()) : nullptr;
  if (!y.bf16) a.out = static_cast<float*>(y.data());
  const Kernels& k = kernels(kind == INT4 ? a.hd / GROUP : 0);
  run("attend", heads * a.splits, 1, partial, [&](int64_t begin, int64_t end) { k.attend(a, kind, begin, end); });
  run("merge", heads * a.T, 1, y.memory, [&](int64_t begin, int64_t end) { k.merge(a, kind >= INT8, begin, end); });
  std::vector<double> expected(y.values.size());
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t t = 0; t < a.T; ++t) {
      std::vector<double> scores(a.S, -INFINITY);
      double top = -INFINITY, total = 0;
      for (int64_t s = 0; s < a.S; ++s) {
        if ((masked && !mask[head / a.nh * a.S + s]) || (a.causal && s > a.S - a.T + t)) continue;
        scores[s] = 0;
        for (int64_t c = 0; c < a.hd; ++c)
          scores[s] += a.scaling * q[(head * a.T + t) * a.hd + c] * keys.values[(head * a.S + s) * a.hd + c];
        top = std::max(top, scores[s]);
      }
      if (top == -INFINITY) continue;
      double* to = expected.data() + ((head / a.nh * a.T + t) * a.nh + head % a.nh) * a.hd;
      for (int64_t s = 0; s < a.S; ++s) total += std::exp(scores[s] - top);
      for (int64_t s = 0; s < a.S; ++s)
        for (int64_t c = 0; c < a.hd; ++c)
          to[c] += std::exp(scores[s] - top) / total * values.values[(head * a.S + s) * a.hd + c];
    }
  const char* names[] = {"attention, float32", "attention, bfloat16", "attention, int8", "attention, int4"};
  close(names[kind], y, expected);
}

void check_norm_and_rotary_and_sums() {
  const bool bf16 = engine() % 2;
  const int64_t rows = 1 + engine() % 9, n = pick({1, 7, 32, 100, 2048});
  Numbers x(rows * n, bf16), weight(n, bf16), y(rows * n, bf16);
  const Norm norm{x.data(), weight.data(), y.data(), n, 1e-6f};
  run("norm", rows, 2, y.memory, [&](int64_t begin, int64_t end) { kernels().norm(norm, bf16, begin, end); });
  std::vector<double> expected(rows * n);
  for (int64_t r = 0; r < rows; ++r) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += x[r * n + i] * x[r * n + i];
    for (int64_t i = 0; i < n; ++i) expected[r * n + i] = x[r * n + i] / std::sqrt(squares / n + 1e-6) * weight[i];
  }
  close("norm", y, expected, bf16 ? 4e-3 : 4e-6);  // rounded before the weight, too

  const int64_t width = bf16 ? 2 : 4;
  for (const bool gate : {false, true}) {
    Numbers other(rows * n, bf16);
    std::vector<double> together(other.values.begin(), other.values.end());
    for (int64_t i = 0; i < rows * n; ++i) gate ? together[i] *= x[i] / (1 + std::exp(-x[i])) : together[i] += x[i];
    run(gate ? "gate" : "add", rows * n, pick({2, 10, 64}), other.memory, [&](int64_t begin, int64_t end) {
      (gate ? kernels().gate : kernels().add)(x.memory.data() + begin * width, bf16, end - begin,
                                              other.memory.data() + begin * width);
    });
    close(gate ? "gate" : "add", other, together, bf16 ? 4e-3 : 4e-6);  // silu is rounded before the product, too
  }

  Rotary a{};
  const int64_t B = 1 + engine() % 2;
  a.nh = 1 + engine() % 3, a.T = 1 + engine() % 4, a.half = pick({1, 8, 20, 32, 64}), a.hd = 2 * a.half + pick({0, 8});
  Numbers heads(B * a.nh * a.T * a.hd, bf16), turned(heads.values.size(), bf16);
  Numbers cos(a.T * a.half, false), sin(a.T * a.half, false);
  a.x = heads.data(), a.x_batch = a.nh * a.T * a.hd, a.x_head = a.T * a.hd, a.x_token = a.hd, a.y = turned.data();
  a.cos = static_cast<float*>(cos.data()), a.sin = static_cast<float*>(sin.data());
  run("rotary", B * a.nh * a.T, 2, turned.memory, [&](int64_t begin, int64_t end) { kernels().rotary(a, bf16, begin, end); });
  std::vector<double> angles(heads.values.begin(), heads.values.end());
  for (int64_t i = 0; i < B * a.nh * a.T; ++i)
    for (int64_t c = 0; c < a.half; ++c) {
      const int64_t at = i % a.T * a.half + c;
      const double one = heads[i * a.hd + c], other = heads[i * a.hd + a.half + c];
      angles[i * a.hd + c] = one * cos[at] - other * sin[at];
      angles[i * a.hd + a.half + c] = other * cos[at] + one * sin[at];
    }
  close("rotary", turned, angles);
}

// Many short stages, of teams that come and go in several threads at once: each does all of its pieces once.
void check_team() {
  threads = 3;
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int call = 0; call < 20; ++call) {
        std::vector<int64_t> counts(97);
        Team::with([&] {
          for (int stage = 0; stage < 50; ++stage) {
            Team::share(counts.size(), 1 + stage % 7, [&](int64_t begin, int64_t end) {
              for (volatile int i = 0; i < 2000; i = i + 1) {}  // who does not wait for it sees what was before
              for (int64_t i = begin; i < end; ++i) ++counts[i];
            });
            for (int64_t count : counts) wrong += count != stage + 1;
          }
        });
        try {
          Team::share(counts.size(), 5, [](int64_t begin, int64_t) { if (begin == 50) throw std::bad_alloc(); });
          ++wrong;
        } catch (const std::bad_alloc&) {
        }
      }
    });
  for (auto& caller : callers) caller.join();
  if (wrong) fail("team", 0, wrong, 0);
}

}  // namespace

int main(int argc, char** argv) {
  const int trials = argc > 1 ? std::atoi(argv[1]) : 100;
  check_team();
  for (level = 0; level < levels().size(); ++level) {
    for (int i = 0; i < trials; ++i) {
      check_linear();
      check_gptq(false);
      check_gptq(true);
      check_attention();
      check_norm_and_rotary_and_sums();
    }
    std::printf("%s: %d random shapes of each kernel\n", levels()[level].name, trials);
  }
  if (failures) std::printf("%d numbers are wrong\n", failures);
  return failures > 0;
}
