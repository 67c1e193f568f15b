// Native CPU kernels of Qwen; qwen_ops.py defines the operators and says what they compute, cpp_kernels.py builds this.
//
// The file has two parts. The first includes the second (this file once more) for every instruction set, and holds
// what calls it: checks, threads, registration. The second holds the kernels, written once with vectors of
// QWEN_WIDTH floats. Which instruction set runs is chosen by the CPU at run time.
//
// Several compilers work at once: QWEN_PART is what an object has, 0: the first part and the plainest set, 1 to 3:
// another set, if this kind of CPU has so many. Together they are the library. Without it one object has everything.
//
// Floating point is not contracted (-ffp-contract=off), so that quantising gives the same codes everywhere;
// `fma` below is meant where it is written.

#ifndef QWEN_WIDTH  // --- part one ---------------------------------------------------------------------------------

#ifndef QWEN_PART
#define QWEN_PART -1  // all of it
#endif
#define QWEN_HAS(part) (QWEN_PART < 0 || QWEN_PART == part)

#include <c10/util/BFloat16.h>

#if QWEN_HAS(0) && !defined(QWEN_KERNELS_ONLY)  // which is without PyTorch's library, for tests on other CPUs
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/List.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/util/Optional.h>
#include <torch/library.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include <pthread.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

namespace qwen_kernels {

using c10::BFloat16;

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// int4, see qwen_ops.py: 8 channels share a step and a centre, chosen from these.
constexpr int GROUP = 8;
constexpr float STEPS[4] = {58. / 64, 77. / 64, 96. / 64, 115. / 64};
constexpr float INVERSES[4] = {64. / 58, 64. / 77, 64. / 96, 64. / 115};
constexpr float CENTRES[8] = {-161. / 64, -115. / 64, -69. / 64, -23. / 64, 23. / 64, 69. / 64, 115. / 64, 161. / 64};

// How many rows of x there is room for: a power of two, for the kernels take so many at a time.
inline int64_t padded_rows(int64_t rows) {
  int64_t padded = 1;
  while (padded < rows) padded *= 2;
  return padded;
}

struct Linear {
  const void* x;  // (padded_rows(rows), in), float or BFloat16
  const void* weight;
  int64_t rows, in, out, weight_stride;
  const float* scale;  // (out, groups) or null
  int64_t groups;
  const void* bias;  // (out), float or BFloat16, or null
  void* y;           // (rows, out)
  bool bf16_bias, bf16_out;
  void* widened;  // (out, in), float or BFloat16: the weight times its scale
  const int16_t* numbers;  // instead of x, for int8: (in / SEGMENT, padded_rows(rows), SEGMENT), in whole steps
  const float* steps;      // (in / SEGMENT, padded_rows(rows))
};

struct Gptq {  // a product with a quantised matrix, or the matrix itself
  const float* x;     // (rows rounded up to a power of two, in)
  const float* sums;  // (rows, segments) of x, or with digits (rows, parts)
  const int8_t* digits;  // (rows, places, in): x in whole steps, for gptq_by_output
  const float* steps;    // (rows, in / SEGMENT)
  int places;
  const int32_t *qweight, *qzeros, *g_idx;  // g_idx null: input i is in group i / group_size
  const uint16_t* scales;                   // float16
  int64_t qweight_stride, qweight_column, qzeros_stride, scales_stride;  // from row to row; from output to output
  int64_t rows, in, out, groups, group_size;
  int bits, zero_offset;
  float* y;  // (rows, out), zeros
  void* weight;  // (out, in), float or BFloat16
};

constexpr int64_t SEGMENT = 128;  // inputs of one group that are summed up before the scale, or that share a step
constexpr int64_t TILE = 512;     // outputs whose sums are kept meanwhile

// Inputs that share a scale and a step.
inline int64_t part_of(int64_t group_size) { return std::min(group_size, SEGMENT); }

struct Store {  // keys or values, (B, nh, S, ...)
  const char *rows, *params;
  int64_t batch, head, token, params_batch, params_head, params_token;  // strides in bytes
};

struct Attention {
  const void* q;  // (B, nh, T, hd), float or BFloat16
  bool q_bf16;
  int64_t q_batch, q_head, q_token;
  float scaling;
  Store k, v;
  const bool* mask;
  int64_t mask_strides[4];
  int64_t B, nh, T, S, hd, splits;
  bool causal;
  float* partial;  // (B * nh, splits, T, hd + 2): weighted sum of the values, largest score, sum of the weights
  BFloat16* out_bf16;  // (B, T, nh, hd), one of the two
  float* out;

  int64_t first_key(int64_t split) const { return S * split / splits; }
};

struct Append {
  const void* x;  // (B, nh, T, hd)
  int64_t x_batch, x_head, x_token;
  uint8_t *codes, *params;
  int64_t codes_batch, codes_head, codes_token, params_batch, params_head, params_token;
  int64_t nh, T, hd;
};

struct Norm {
  const void *x, *weight;
  void* y;
  int64_t n;
  float eps;
};

struct Rotary {
  const void* x;  // (B, nh, T, hd)
  int64_t x_batch, x_head, x_token;
  const float *cos, *sin;  // (B or 1, T, half)
  int64_t angles_batch;
  void* y;
  int64_t nh, T, hd, half;  // half of the channels that are rotated
};

enum Kind { F32, BF16, INT8, INT4 };

struct Kernels {
  void (*linear)(const Linear&, bool int8, int64_t begin, int64_t end);  // output channels
  void (*whole_steps)(const BFloat16* x, const Linear&, int16_t* numbers, float* steps);
  void (*gptq)(const Gptq&, int64_t begin, int64_t end);                        // output channels
  void (*fixed_point)(const float* x, const Gptq&, int8_t* digits, float* steps, float* sums);  // of a row
  void (*gptq_by_output)(const Gptq&, int64_t begin, int64_t end);               // output channels
  void (*widen)(const Linear&, bool bf16, int64_t begin, int64_t end);          // output channels
  void (*dequantize)(const Gptq&, bool bf16, int64_t begin, int64_t end);       // output channels
  void (*attend)(const Attention&, Kind, int64_t begin, int64_t end);            // splits of heads
  void (*merge)(const Attention&, bool rotated, int64_t begin, int64_t end);     // queries
  void (*append)(const Append&, bool bf16, bool int4, int64_t begin, int64_t end);  // rows of x
  void (*norm)(const Norm&, bool bf16, int64_t begin, int64_t end);              // rows
  void (*rotary)(const Rotary&, bool bf16, int64_t begin, int64_t end);          // rows
  void (*add)(const void* x, bool bf16, int64_t n, void* y);                     // y + x
  void (*gate)(const void* x, bool bf16, int64_t n, void* y);                    // y * silu(x)
};

#define QWEN_STRING(x) #x
#if defined(__clang__)
#define QWEN_BEGIN(set) _Pragma(QWEN_STRING(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define QWEN_END _Pragma("clang attribute pop")
#else
#define QWEN_BEGIN(set) _Pragma("GCC push_options") _Pragma(QWEN_STRING(GCC target(set)))
#define QWEN_END _Pragma("GCC pop_options")
#endif

#if QWEN_HAS(0)
#define QWEN_LEVEL portable
#define QWEN_WIDTH 4
#include __FILE__
#undef QWEN_LEVEL
#undef QWEN_WIDTH
#endif

#if defined(__x86_64__)
#if QWEN_HAS(1)
QWEN_BEGIN("avx2,fma")
#define QWEN_LEVEL avx2
#define QWEN_WIDTH 8
#include __FILE__
#undef QWEN_LEVEL
#undef QWEN_WIDTH
QWEN_END
#endif

#if QWEN_HAS(2)
QWEN_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define QWEN_LEVEL avx512
#define QWEN_WIDTH 16
#include __FILE__
#undef QWEN_LEVEL
#undef QWEN_WIDTH
QWEN_END
#endif

#if QWEN_HAS(3)
QWEN_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma")
#define QWEN_LEVEL avx512_bf16
#define QWEN_WIDTH 16
#define QWEN_BF16
#include __FILE__
#undef QWEN_BF16
#undef QWEN_LEVEL
#undef QWEN_WIDTH
QWEN_END
#endif

#elif defined(__aarch64__)
#if QWEN_HAS(1)
#if defined(__clang__)
QWEN_BEGIN("bf16")
#else
QWEN_BEGIN("+bf16")
#endif
#define QWEN_LEVEL neon_bf16
#define QWEN_WIDTH 4
#define QWEN_BF16
#include __FILE__
#undef QWEN_BF16
#undef QWEN_LEVEL
#undef QWEN_WIDTH
QWEN_END
#endif
#endif

#if QWEN_HAS(0)

// What is compiled above, or beside this.
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels KERNELS;
}
namespace avx512 {
extern const Kernels KERNELS;
}
namespace avx512_bf16 {
void linear(const Linear&, bool int8, int64_t begin, int64_t end);
void gptq_by_output(const Gptq&, int64_t begin, int64_t end);
}
#elif defined(__aarch64__)
namespace neon_bf16 {
void linear(const Linear&, bool int8, int64_t begin, int64_t end);
}

// Whether this CPU multiplies pairs of bfloat16.
bool has_bfdot() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16, which older headers lack
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof found;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}
#endif

// The instruction sets that this CPU has, the widest last.
struct Level {
  const char* name;
  int width;
  Kernels kernels;
  void (*linear_bf16)(const Linear&, bool int8, int64_t begin, int64_t end);  // x bfloat16 too, or null
  void (*gptq_vnni)(const Gptq&, int64_t begin, int64_t end);  // for gptq_by_output, or null
};

const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
#if defined(__aarch64__)  // which all have NEON
    std::vector<Level> found{{"neon", 4, portable::KERNELS, nullptr, nullptr}};
    if (has_bfdot()) found.push_back({"neon_bf16", 4, portable::KERNELS, neon_bf16::linear, nullptr});
#else
    std::vector<Level> found{{"portable", 4, portable::KERNELS, nullptr, nullptr}};
#endif
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) found.push_back({"avx2", 8, avx2::KERNELS, nullptr, nullptr});
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      found.push_back({"avx512", 16, avx512::KERNELS, nullptr, nullptr});
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
        found.push_back({"avx512_bf16", 16, avx512::KERNELS, avx512_bf16::linear, avx512_bf16::gptq_by_output});
    }
#endif
    return found;
  }();
  return all;
}

size_t level = levels().size() - 1;

// int4 wants the groups of a head to fill vectors.
const Kernels& kernels(int64_t groups = 0) {
  size_t i = level;
  while (i > 0 && groups % levels()[i].width != 0) --i;
  return levels()[i].kernels;
}

// The name of the instruction set in use; a name given is used from now on (for tests and benchmarks).
std::string cpu_level(std::string name) {
  std::string known;
  for (size_t i = 0; i < levels().size(); ++i) {
    if (name == levels()[i].name) level = i;
    known += (i ? ", " : "") + std::string(levels()[i].name);
  }
  if (!name.empty() && name != levels()[level].name)
    throw std::runtime_error("this CPU has " + known + "; found " + name);
  return levels()[level].name;
}

// --- threads ---
//
// The threads of a native call, which stay for the whole call, of many stages. They are PyTorch's own where it has
// them from OpenMP, which this is compiled with then: OpenMP's spin for a while after each of PyTorch's operations, and
// others would be in their way. Elsewhere they are started for the call. A stage is handed out in pieces by counters,
// and who leads waits for pieces that were begun, not for threads: one whose core is taken away, or that comes late,
// costs its share and no more. A thread takes neighbouring pieces, whose memory was asked for ahead, as long as there
// are any. No result depends on where pieces begin, and so none does on the number of threads.

#ifdef QWEN_KERNELS_ONLY
int threads = 1;
int number_of_threads() { return threads; }
#else
int number_of_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }
#endif

#ifdef _OPENMP
// A child has none of the threads that OpenMP had before, and OpenMP waits for them forever.
std::atomic<bool> forked{false};
const int handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

class Team {
 public:
  // f with a team to lead, if there are threads for one; the stages in it are then the team's.
  template <class F>
  static void with(const F& f) {
    const int n = led ? 1 : number_of_threads();
    if (n == 1) return f();
    Team team(n);
#ifdef _OPENMP
    if (!forked)
      return at::parallel_for(0, n, 1, [&](int64_t begin, int64_t) {
        if (begin > 0) return team.follow(begin);
        const Lead lead{&team};
        f();
      });
#endif
    struct Threads : std::vector<std::thread> {
      ~Threads() {
        for (auto& thread : *this) thread.join();
      }
    } threads;
    const Lead lead{&team};
    try {
      for (int i = 1; i < n; ++i) threads.emplace_back([&team, i] { team.follow(i); });
    } catch (const std::system_error&) {  // the system gives no more
    }
    f();
  }

  // f(begin, end) for pieces of 0 ... n.
  template <class F>
  static void share(int64_t n, int64_t piece, const F& f) {
    if (n <= piece) return f(0, n);
    with([&] {
      if (!led) return f(0, n);
      const auto each = [&](int64_t i) { f(i * piece, std::min(n, (i + 1) * piece)); };
      led->stage((n + piece - 1) / piece, &each,
                 [](const void* work, int64_t i) { (*static_cast<const decltype(each)*>(work))(i); });
    });
  }

  // Threads of the team that this thread leads, or would lead.
  static int64_t size() { return led ? led->counters.size() : number_of_threads(); }

 private:
  static thread_local Team* led;  // by this thread

  struct Lead {
    explicit Lead(Team* team) { led = team; }
    ~Lead() {
      led->over = true;
      led->wake();
      led = nullptr;
    }
  };

  struct alignas(64) Counter {
    std::atomic<int64_t> left{0};  // pieces that nobody has taken; below 0 they are gone
  };
  std::vector<Counter> counters;  // one a thread, for its share of the pieces

  // The stage, written by who leads while there are no pieces, read by who has taken one.
  const void* work;
  void (*call)(const void*, int64_t);
  int64_t pieces;
  std::exception_ptr error;

  alignas(64) std::atomic<int64_t> begun{0};  // stages; who waits looks at this line alone
  std::atomic<bool> over{false};
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<int> asleep{0};
  std::mutex mutex;
  std::condition_variable changed;

  explicit Team(int n) : counters(n) {}

  int64_t share_begin(int64_t thread) const { return pieces * thread / static_cast<int64_t>(counters.size()); }

  void stage(int64_t n, const void* what, void (*how)(const void*, int64_t)) {
    work = what, call = how, pieces = n, error = nullptr, done = 0;
    for (size_t i = 0; i < counters.size(); ++i)  // without an order, for which each would wait for all cores
      counters[i].left.store(share_begin(i + 1) - share_begin(i), std::memory_order_release);
    ++begun;
    wake();
    while (help(0)) {}
    wait([&] { return done == n; });
    if (error) std::rethrow_exception(error);
  }

  void follow(int64_t thread) {
    while (!over) {
      const int64_t before = begun;
      while (help(thread)) {}
      wait([&] { return over || begun != before; });
    }
  }

  // Does a piece, if one is left: of this thread's share, else of another's.
  bool help(int64_t thread) {
    const int64_t n = counters.size();
    for (int64_t i = thread; i < thread + n; ++i) {
      Counter& counter = counters[i % n];
      if (counter.left <= 0) continue;
      const int64_t rest = counter.left.fetch_sub(1);
      if (rest <= 0) continue;
      const int64_t all = pieces;
      try {
        call(work, share_begin(i % n + 1) - rest);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        error = std::current_exception();
      }
      if (done.fetch_add(1) + 1 == all) wake();
      return true;
    }
    return false;
  }

  // Stages follow each other within microseconds; longer is a core that is taken away, and sleeping may give it ours.
  template <class F>
  void wait(const F& ready) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    do {
      for (int i = 0; i < 32; ++i) {
        if (ready()) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex);
    ++asleep;
    changed.wait(lock, ready);
    --asleep;
  }

  void wake() {
    if (asleep == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex); }  // who is about to sleep does, and is woken
    changed.notify_all();
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
  }
};

thread_local Team* Team::led = nullptr;

// A piece of work: long enough to be worth handing out and to read memory in long runs, short enough to wait for.
constexpr int64_t PIECE = 1 << 17;  // bytes read

int64_t piece(int64_t bytes_each) { return std::max<int64_t>(1, PIECE / std::max<int64_t>(1, bytes_each)); }

// Outputs of a matrix that make a piece: several for each thread, as in the end all wait for the last.
int64_t product_piece(int64_t out, int64_t bytes_each) {
  const int64_t eighth = out * bytes_each / (8 * Team::size());
  const int64_t bytes = std::max<int64_t>(PIECE / 8, std::min(PIECE, eighth));
  return std::max<int64_t>(1, bytes / std::max<int64_t>(1, bytes_each));
}

constexpr int64_t GPTQ_UNIT = 64, BY_OUTPUT_UNIT = 16;  // outputs, multiples of all vectors

// Outputs of a quantised matrix that make a piece. They lie side by side: many are read from
// memory in long runs, fewer leave fewer threads without work in the end.
int64_t gptq_piece(int64_t out, int64_t bytes_each) {
  constexpr int64_t WIDTHS[] = {4 * GPTQ_UNIT, 2 * GPTQ_UNIT, GPTQ_UNIT};
  constexpr int64_t TIMES[] = {100, 115, 140};  // that an output takes in them, measured
  int64_t best = 0, least = std::numeric_limits<int64_t>::max();
  for (int i = 0; i < 3; ++i) {
    const int64_t each = Team::size() * WIDTHS[i], time = (out + each - 1) / each * WIDTHS[i] * TIMES[i];
    if (time < least) least = time, best = WIDTHS[i];
  }
  return std::max(best, piece(2 * bytes_each) / GPTQ_UNIT * GPTQ_UNIT);
}

#ifndef QWEN_KERNELS_ONLY

using at::Tensor;
using c10::optional;

Tensor floats(const Tensor& t) { return t.to(at::kFloat).contiguous(); }

// f(p), with the type of what p points to.
template <class F>
void with_type(at::ScalarType type, void* p, const F& f) {
  if (type == at::kFloat) f(static_cast<float*>(p));
  if (type == at::kBFloat16) f(static_cast<BFloat16*>(p));
  if (type == at::kHalf) f(static_cast<c10::Half*>(p));
}
bool has_type(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf; }

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

// Whether PyTorch's products of bfloat16 are fast: without instructions for them they take several times as long as those
// of float32. qwen_ops.py asks PyTorch the same.
bool multiplies_bf16() {
#if defined(__aarch64__)
  return at::hasMKLDNN() && levels()[level].linear_bf16;
#else
  return at::hasMKLDNN() && levels()[level].width == 16;
#endif
}

// PyTorch's product of many rows, and bias, with a matrix of codes, or of numbers that it multiplies slowly: a block of
// its outputs at a time is written out by fill(first, length, bf16, to), where caches hold it until it is multiplied.
template <class F>
Tensor product_by_blocks(const Tensor& x, int64_t out, const optional<Tensor>& bias, const F& fill) {
  // Of few outputs each of many threads would have too little to multiply.
  const int64_t weights = (int64_t{1} << 21) * std::min(number_of_threads(), 8);
  // Most CPUs multiply float16 several times more slowly than float32.
  const auto dtype = x.scalar_type() == at::kBFloat16 && multiplies_bf16() ? at::kBFloat16 : at::kFloat;
  const int64_t in = x.size(-1), width = std::max<int64_t>(1, weights / std::max<int64_t>(1, in) / 64) * 64;
  const Tensor rows = x.reshape({rows_of(x), in}).to(dtype), added = bias ? bias->to(dtype) : Tensor();
  const Tensor weight = at::empty({std::min(width, out), in}, rows.options());
  const Tensor y = at::empty({rows.size(0), out}, rows.options());
  for (int64_t first = 0; first < out; first += width) {
    const int64_t length = std::min(width, out - first);
    fill(first, length, dtype == at::kBFloat16, weight.data_ptr());
    const Tensor block = weight.narrow(0, 0, length).t();
    Tensor to = y.narrow(1, first, length);
    bias ? at::addmm_out(to, added.narrow(0, first, length), rows, block) : at::mm_out(to, rows, block);
  }
  auto shape = x.sizes().vec();
  shape.back() = out;
  return y.to(x.scalar_type()).view(shape);
}

// product(eight) for eight rows of x after the other.
template <class F>
Tensor product_in_eights(const Tensor& x, int64_t out, const F& product) {
  std::vector<Tensor> parts;
  Team::with([&] {
    for (const Tensor& eight : x.reshape({rows_of(x), x.size(-1)}).split(8)) parts.push_back(product(eight));
  });
  auto shape = x.sizes().vec();
  shape.back() = out;
  return at::cat(parts).view(shape);
}

// The sums of every row of x over the segments of the groups, in their order.
std::vector<float> segment_sums(const float* x, int64_t rows, int64_t in, int64_t group_size) {
  std::vector<float> sums;
  for (int64_t r = 0; r < rows; ++r, x += in)
    for (int64_t group = 0; group < in; group += group_size)
      for (int64_t i = group, last = std::min(in, group + group_size); i < last; i += SEGMENT) {
        float part[8] = {};
        int64_t k = i;
        const int64_t end = std::min(last, i + SEGMENT);
        for (; k + 8 <= end; k += 8)
          for (int j = 0; j < 8; ++j) part[j] += x[k + j];
        for (; k < end; ++k) part[0] += x[k];
        sums.push_back(((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])));
      }
  return sums;
}

// Up to 8 rows of x in the forms that kernels read, each made when it is first asked for; rows of zeros fill them up to
// a power of two.
class Rows {
 public:
  Tensor tensor;  // contiguous; float32 instead of float16
  int64_t number, padded, in;
  bool bf16;
  int places;  // in fixed point

  // From now on these; what products read is gone.
  void take(const Tensor& x) {
    tensor = x.scalar_type() == at::kHalf ? x.to(at::kFloat).contiguous() : x.contiguous();
    number = rows_of(x), in = x.size(-1), bf16 = x.scalar_type() == at::kBFloat16;
    places = x.scalar_type() == at::kFloat ? 3 : 2;
    padded = padded_rows(number);
    summed.clear(), widened.clear(), filled_halves.clear(), fixed.clear(), numbers.clear();
  }

  const BFloat16* halves() {  // of bfloat16
    if (padded == number) return tensor.data_ptr<BFloat16>();
    return filled<BFloat16>(filled_halves).data();
  }

  const float* floats() {
    if (!bf16 && padded == number) return tensor.data_ptr<float>();
    return bf16 ? filled<BFloat16>(widened).data() : filled<float>(widened).data();
  }

  // What products of whole segments with int8 want of bfloat16, into `a`.
  void in_whole_steps(Linear& a) {
    if (numbers.empty()) {
      numbers.resize(padded * in), steps.resize(padded * (in / SEGMENT));
      kernels().whole_steps(tensor.data_ptr<BFloat16>(), a, numbers.data(), steps.data());
    }
    a.numbers = numbers.data(), a.steps = steps.data();
  }

  // What gptq_by_output wants of x, into `a`.
  void in_fixed_point(Gptq& a) {
    const int64_t part = part_of(a.group_size), segments = in / SEGMENT;
    auto found = std::find_if(fixed.begin(), fixed.end(), [&](const Fixed& f) { return f.bits == a.bits && f.part == part; });
    if (found == fixed.end()) {
      fixed.push_back({a.bits, part, std::vector<int8_t>(padded * places * in), std::vector<float>(padded * segments),
                       std::vector<float>(padded * (in / part))});
      found = fixed.end() - 1;
      a.places = places;
      for (int64_t r = 0; r < padded; ++r)
        kernels().fixed_point(floats() + r * in, a, found->digits.data() + r * places * in,
                              found->steps.data() + r * segments, found->sums.data() + r * (in / part));
    }
    a.places = places, a.digits = found->digits.data(), a.steps = found->steps.data(), a.sums = found->sums.data();
  }

  const float* sums(int64_t group_size) {
    for (const auto& each : summed)
      if (each.first == group_size) return each.second.data();
    summed.emplace_back(group_size, segment_sums(floats(), padded, in, group_size));
    return summed.back().second.data();
  }

 private:
  std::vector<std::pair<int64_t, std::vector<float>>> summed;
  std::vector<float> widened, steps;
  std::vector<BFloat16> filled_halves;
  std::vector<int16_t> numbers;

  struct Fixed {
    int bits;
    int64_t part;
    std::vector<int8_t> digits;
    std::vector<float> steps, sums;
  };
  std::vector<Fixed> fixed;

  template <class T, class U>
  std::vector<U>& filled(std::vector<U>& to) {
    if (!to.empty()) return to;
    to.resize(padded * in);
    std::copy(tensor.data_ptr<T>(), tensor.data_ptr<T>() + number * in, to.begin());
    return to;
  }
};

// A product of rows, which outlive it, with a matrix: of outputs [begin, end), from a multiple of `unit` on.
struct Product {
  int64_t out, unit, bytes;  // bytes that an output reads
  std::function<void(int64_t begin, int64_t end)> run;
};

// Products with matrices of as many outputs, in pieces: all of them, and then finish(begin, end).
template <class F>
void multiply(std::initializer_list<Product> products, const F& finish) {
  const int64_t out = products.begin()->out;
  int64_t unit = 0, bytes = 0;
  for (const Product& product : products) {
    TORCH_CHECK(product.out == out, "matrices of ", out, " and ", product.out, " outputs don't belong together");
    unit = std::max(unit, product.unit), bytes += product.bytes;
  }
  int64_t width = unit == GPTQ_UNIT ? gptq_piece(out, bytes) : product_piece(out, bytes);
  width = (width + unit - 1) / unit * unit;
  Team::share(out, width, [&](int64_t begin, int64_t end) {
    for (const Product& product : products) product.run(begin, end);
    finish(begin, end);
  });
}

void nothing(int64_t, int64_t) {}

// What is said about the matrix, checked; the tensors are kept alive by the caller.
Linear linear_matrix(Tensor& weight, optional<Tensor>& bias, optional<Tensor>& scale) {
  const bool int8 = weight.scalar_type() == at::kChar;
  TORCH_CHECK(int8 || weight.scalar_type() == at::kBFloat16, "linear: weight must be bfloat16 or int8, found ",
              weight.scalar_type());
  TORCH_CHECK(weight.dim() == 2, "linear: weight must be a matrix, found ", weight.sizes());
  TORCH_CHECK(int8 == scale.has_value(), "linear: int8 weights have a scale, others don't");
  if (weight.stride(1) != 1 && weight.size(1) > 1) weight = weight.contiguous();
  Linear a{};
  a.in = weight.size(1), a.out = weight.size(0), a.weight = weight.data_ptr(), a.weight_stride = weight.stride(0);
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == a.out, "linear: bias must be (", a.out, "), found ",
                bias->sizes());
    a.bf16_bias = bias->scalar_type() == at::kBFloat16;
    bias = a.bf16_bias ? bias->contiguous() : floats(*bias), a.bias = bias->data_ptr();
  }
  if (int8) {
    TORCH_CHECK(scale->size(0) == a.out && scale->dim() <= 2, "linear: scale must be (out,) or (out, groups)");
    scale = floats(*scale), a.scale = scale->data_ptr<float>(), a.groups = scale->dim() == 2 ? scale->size(1) : 1;
    TORCH_CHECK(a.groups > 0 && a.in % a.groups == 0, "linear: ", a.groups, " groups don't divide ", a.in);
  }
  return a;
}

Product linear_product(Rows& x, Tensor weight, optional<Tensor> bias, optional<Tensor> scale, void* y) {
  Linear a = linear_matrix(weight, bias, scale);
  TORCH_CHECK(x.in == a.in, "linear: x of ", x.in, " inputs and weight ", weight.sizes(), " don't fit");
  const bool int8 = a.scale;
  const bool whole_steps = int8 && x.bf16 && a.in / a.groups % SEGMENT == 0;
  const bool bf16 = x.bf16 && int8 == whole_steps && levels()[level].linear_bf16;
  a.rows = x.number, a.bf16_out = x.bf16, a.y = y;
  if (whole_steps)
    x.in_whole_steps(a);
  else
    a.x = bf16 ? static_cast<const void*>(x.halves()) : x.floats();
  const auto run = bf16 ? levels()[level].linear_bf16 : kernels().linear;
  // Pairs of channels stay together: a channel alone has another order of sums.
  return {a.out, 2, a.in * static_cast<int64_t>(weight.element_size()),
          [=](int64_t begin, int64_t end) {
            run(a, int8, begin, end);
            (void)weight, (void)bias, (void)scale;  // so that they are captured, and live as long
          }};
}

Tensor linear(const Tensor& x, Tensor weight, optional<Tensor> bias, optional<Tensor> scale) {
  const bool int8 = weight.scalar_type() == at::kChar;
  if (int8 && x.scalar_type() == at::kHalf) return linear(x.to(at::kFloat), weight, bias, scale).to(at::kHalf);
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "linear: x must be float32 or bfloat16, found ", x.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "linear: x ", x.sizes(),
              " and weight ", weight.sizes(), " don't fit");
  const int64_t rows = rows_of(x), out = weight.size(0);
  if (rows > 8 && !int8) {
    if (x.scalar_type() == at::kBFloat16 && multiplies_bf16()) return at::linear(x, weight, bias);
    if (rows <= 64)  // which take less time so than writing the matrix out
      return product_in_eights(x, out, [&](const Tensor& eight) { return linear(eight, weight, bias, scale); });
    const Tensor w = weight.contiguous();
    const int64_t in = w.size(1);
    return product_by_blocks(x, out, bias, [&](int64_t first, int64_t length, bool, void* to) {
      Team::share(length, piece(2 * in), [&](int64_t begin, int64_t end) {
        const BFloat16* from = w.data_ptr<BFloat16>() + first * in;
        std::copy(from + begin * in, from + end * in, static_cast<float*>(to) + begin * in);
      });
    });
  }
  if (rows > 8) {
    optional<Tensor> none;
    const Linear a = linear_matrix(weight, none, scale);
    TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out), "linear: bias must be (", out, "), found ",
                bias->sizes());
    return product_by_blocks(x, out, bias, [&](int64_t first, int64_t length, bool bf16, void* to) {
      Linear part = a;
      part.weight = weight.data_ptr<int8_t>() + first * a.weight_stride, part.scale += first * a.groups;
      part.widened = to;
      Team::share(length, piece(a.in),
                  [&](int64_t begin, int64_t end) { kernels().widen(part, bf16, begin, end); });
    });
  }
  auto shape = x.sizes().vec();
  shape.back() = out;
  Tensor y = at::empty(shape, x.options());
  Rows few;
  few.take(x);
  const Product product = linear_product(few, weight, bias, scale, y.data_ptr());
  if (y.numel() > 0) multiply({product}, nothing);
  return y;
}

// Whether a product wants an output's codes side by side: what lies in memory as a row does in the file is read in short
// runs. Segments and parts have to fill vectors then.
bool gptq_wants_side_by_side(int64_t in, int64_t group_size) {
  const int64_t part = part_of(group_size);
  return in % SEGMENT == 0 && part >= 32 && SEGMENT % part == 0 && group_size % part == 0;
}

// What is said about the matrix, checked; the tensors are kept alive by the caller.
Gptq gptq_matrix(Tensor& qweight, Tensor& qzeros, Tensor& scales, optional<Tensor>& g_idx, int64_t bits,
                 int64_t group_size, int64_t zero_offset) {
  TORCH_CHECK((bits == 4 || bits == 8) && group_size > 0, "gptq: bits must be 4 or 8 and the group positive, found ", bits,
              " and ", group_size);
  Gptq a{};
  const int64_t n = 32 / bits;
  for (const Tensor* t : {&qweight, &qzeros})
    TORCH_CHECK(t->scalar_type() == at::kInt && t->dim() == 2, "gptq: qweight and qzeros must be int32 matrices");
  a.in = qweight.size(0) * n, a.out = qweight.size(1), a.groups = scales.size(0), a.group_size = group_size;
  a.bits = bits, a.zero_offset = zero_offset;
  TORCH_CHECK(scales.dim() == 2 && scales.size(1) == a.out && qzeros.size(0) == a.groups && qzeros.size(1) * n == a.out,
              "gptq: qweight ", qweight.sizes(), ", qzeros ", qzeros.sizes(), " and scales ", scales.sizes(), " don't fit");
  if (!g_idx && group_size % n != 0) g_idx = at::arange(a.in, qweight.options()).floor_divide(group_size).to(at::kInt);
  if (g_idx) {
    g_idx = g_idx->to(at::kInt).contiguous();
    TORCH_CHECK(g_idx->numel() == a.in, "gptq: g_idx must be (", a.in, "), found ", g_idx->sizes());
    a.g_idx = g_idx->data_ptr<int32_t>();
  } else {
    TORCH_CHECK((a.in + group_size - 1) / group_size == a.groups, "gptq: ", a.groups, " groups of ", group_size,
                " don't make ", a.in);
  }
  if (scales.scalar_type() != at::kHalf) scales = scales.to(at::kHalf);
  const bool by_output = qweight.stride(0) == 1 && qweight.stride(1) == qweight.size(0) && !a.g_idx &&
                         gptq_wants_side_by_side(a.in, group_size);
  for (Tensor* t : {&qweight, &qzeros, &scales})
    if (t->stride(1) != 1 && !(by_output && t == &qweight)) *t = t->contiguous();
  a.qweight = qweight.data_ptr<int32_t>(), a.qweight_stride = qweight.stride(0), a.qweight_column = qweight.stride(1);
  a.qzeros = qzeros.data_ptr<int32_t>(), a.qzeros_stride = qzeros.stride(0);
  a.scales = static_cast<const uint16_t*>(scales.data_ptr()), a.scales_stride = scales.stride(0);
  return a;
}

// The matrix from output `first` on, a multiple of 8.
Gptq gptq_from(Gptq a, int64_t first) {
  a.qweight += first * a.qweight_column, a.qzeros += first / (32 / a.bits), a.scales += first;
  return a;
}

// Writes outputs [first, first + length) of the matrix, first a multiple of 8, as (length, in).
void gptq_write(const Gptq& a, int64_t first, int64_t length, bool bf16, void* to) {
  Gptq part = gptq_from(a, first);
  part.weight = to;
  constexpr int64_t PART = 64;
  Team::share((length + PART - 1) / PART, piece(a.in * a.bits / 8 * PART), [&](int64_t begin, int64_t end) {
    kernels().dequantize(part, bf16, begin * PART, std::min(length, end * PART));
  });
}

// y (rows, out) in `kind`.
Product gptq_product(Rows& x, Tensor qweight, Tensor qzeros, Tensor scales, optional<Tensor> g_idx, int64_t bits,
                     int64_t group_size, int64_t zero_offset, const optional<Tensor>& bias, void* y,
                     at::ScalarType kind) {
  Gptq a = gptq_matrix(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset);
  TORCH_CHECK(x.in == a.in, "gptq_linear: x of ", x.in, " and a matrix of ", a.in, " inputs don't fit");
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == a.out), "gptq_linear: bias must be (", a.out,
              "), found ", bias->sizes());
  a.rows = x.number, a.x = x.floats();
  const bool by_output = a.qweight_stride == 1 && a.out > 1;
  auto run = kernels().gptq;
  if (by_output) {
    run = levels()[level].gptq_vnni ? levels()[level].gptq_vnni : kernels().gptq_by_output;
    x.in_fixed_point(a);
  } else if (!a.g_idx) {
    a.sums = x.sums(group_size);
  }
  optional<Tensor> added = bias;
  if (bias) added = has_type(bias->scalar_type()) ? bias->contiguous() : floats(*bias);
  const int64_t padded = x.padded;
  return {a.out, by_output ? BY_OUTPUT_UNIT : GPTQ_UNIT, a.in * bits / 8, [=](int64_t begin, int64_t end) {
            const int64_t width = end - begin;
            std::vector<float> totals(padded * width);
            Gptq part = gptq_from(a, begin);
            part.out = width, part.y = totals.data();
            run(part, 0, width);
            const auto add = [&](const auto* b) {
              for (int64_t r = 0; r < a.rows; ++r)
                for (int64_t o = 0; o < width; ++o) totals[r * width + o] += b[begin + o];
            };
            if (added) with_type(added->scalar_type(), added->data_ptr(), add);
            const auto write = [&](auto* to) {
              for (int64_t r = 0; r < a.rows; ++r)
                std::copy_n(totals.data() + r * width, width, to + r * a.out + begin);
            };
            with_type(kind, y, write);
            (void)qweight, (void)qzeros, (void)scales, (void)g_idx;  // as above
          }};
}

Tensor gptq_linear(const Tensor& x, Tensor qweight, Tensor qzeros, Tensor scales, optional<Tensor> g_idx, int64_t bits,
                   int64_t group_size, int64_t zero_offset, const optional<Tensor>& bias) {
  Gptq a = gptq_matrix(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == a.in, "gptq_linear: x ", x.sizes(), " and ", a.in, " inputs don't fit");
  const auto kind = x.scalar_type();
  TORCH_CHECK(has_type(kind), "gptq_linear: x must be float32, bfloat16 or float16, found ", kind);
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == a.out), "gptq_linear: bias must be (", a.out,
              "), found ", bias->sizes());
  a.rows = rows_of(x);
  auto shape = x.sizes().vec();
  shape.back() = a.out;
  if (a.rows > (g_idx ? 16 : 32))  // fewer take less time in eights than writing the matrix out
    return product_by_blocks(x, a.out, bias, [&](int64_t first, int64_t length, bool bf16, void* to) {
      gptq_write(a, first, length, bf16, to);
    });
  if (a.rows > 8)
    return product_in_eights(x, a.out, [&](const Tensor& eight) {
      return gptq_linear(eight, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, bias);
    });
  const Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  Rows few;
  few.take(x);
  multiply({gptq_product(few, qweight, qzeros, scales, g_idx, bits, group_size, zero_offset, bias, y.data_ptr(), kind)},
           nothing);
  return y;
}

Tensor gptq_dequantize(Tensor qweight, Tensor qzeros, Tensor scales, optional<Tensor> g_idx, int64_t bits,
                       int64_t group_size, int64_t zero_offset, at::ScalarType dtype) {
  const Gptq a = gptq_matrix(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset);
  const bool bf16 = dtype == at::kBFloat16;
  const Tensor weight = at::empty({a.out, a.in}, qweight.options().dtype(bf16 ? at::kBFloat16 : at::kFloat));
  if (weight.numel() > 0) gptq_write(a, 0, a.out, bf16, weight.data_ptr());
  return weight.t().to(dtype).contiguous();
}

// A row of keys, values, codes or parameters has to lie in one piece; copies what does not.
Tensor with_rows(const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

Store store(const Tensor& rows, const Tensor& params) {
  const int64_t n = rows.element_size();
  return {static_cast<const char*>(rows.data_ptr()), static_cast<const char*>(params.data_ptr()),
          rows.stride(0) * n, rows.stride(1) * n, rows.stride(2) * n,
          params.stride(0), params.stride(1), params.stride(2)};
}

void set_mask(Attention& a, const optional<Tensor>& mask) {
  if (!mask) return;
  TORCH_CHECK(mask->scalar_type() == at::kBool && mask->dim() == 4, "mask must be boolean (B, nh, T, S)");
  const int64_t sizes[4] = {a.B, a.nh, a.T, a.S};
  for (int i = 0; i < 4; ++i) {
    TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == sizes[i], "mask ", mask->sizes(), " does not fit");
    a.mask_strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  a.mask = mask->data_ptr<bool>();
}

// y (B, T, nh, hd). The keys of a head are split into items, for each of which `each(run, item)` calls run(a, item), or
// with an Attention of its own.
template <class F>
void attend(Attention& a, Kind kind, Tensor& y, std::vector<float>& partial, const F& each) {
  y.scalar_type() == at::kFloat ? a.out = y.data_ptr<float>() : nullptr;
  y.scalar_type() == at::kFloat ? nullptr : a.out_bf16 = y.data_ptr<BFloat16>();
  constexpr int64_t ENOUGH = 256;  // pieces of at least 256 keys, for any number of threads
  const int64_t heads = a.B * a.nh;
  a.splits = std::max<int64_t>(1, std::min((ENOUGH + heads - 1) / heads, a.S / 256));
  partial.resize(heads * a.splits * a.T * (a.hd + 2)), a.partial = partial.data();
  std::vector<std::atomic<int64_t>> attended(heads);  // items
  const Kernels& kernel = kernels(kind == INT4 ? a.hd / GROUP : 0);
  const auto run = [&](const Attention& of, int64_t item) { kernel.attend(of, kind, item, item + 1); };
  Team::share(heads * a.splits, piece(a.S / a.splits * a.T * a.hd * 4), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      each(run, item);
      const int64_t head = item / a.splits;
      if (++attended[head] == a.splits) kernel.merge(a, kind >= INT8, head * a.T, (head + 1) * a.T);
    }
  });
}

Tensor attention(Attention& a, const Tensor& q, const optional<Tensor>& mask, double scaling, bool causal,
                 Kind kind) {
  TORCH_CHECK(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16,
              "q must be float32 or bfloat16, found ", q.scalar_type());
  a.B = q.size(0), a.nh = q.size(1), a.T = q.size(2), a.hd = q.size(3), a.causal = causal;
  const Tensor queries = with_rows(q);
  a.q = queries.data_ptr(), a.q_bf16 = q.scalar_type() == at::kBFloat16, a.scaling = static_cast<float>(scaling);
  a.q_batch = queries.stride(0), a.q_head = queries.stride(1), a.q_token = queries.stride(2);
  set_mask(a, mask);
  Tensor y = at::empty({a.B, a.T, a.nh, a.hd}, q.options());
  std::vector<float> partial;
  if (y.numel() > 0) attend(a, kind, y, partial, [&](const auto& run, int64_t item) { run(a, item); });
  return y;
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& mask,
                        double scaling, bool causal) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
                  q.size(1) == k.size(1) && q.size(3) == k.size(3),
              "decode_attention: q ", q.sizes(), ", k ", k.sizes(), ", v ", v.sizes(), " don't fit");
  TORCH_CHECK(k.scalar_type() == v.scalar_type() && (k.scalar_type() == at::kFloat || k.scalar_type() == at::kBFloat16),
              "decode_attention: keys and values must be float32 or bfloat16");
  const Tensor keys = with_rows(k), values = with_rows(v);
  Attention a{};
  a.k = store(keys, keys), a.v = store(values, values), a.S = k.size(2);  // without parameters
  return attention(a, q, mask, scaling, causal, k.scalar_type() == at::kFloat ? F32 : BF16);
}

// Bytes of parameters that a head of a token has beside its codes.
int64_t params_size(int64_t hd, bool int4) { return int4 ? 2 + hd / GROUP / 2 + (hd / GROUP + 7) / 8 : 4; }

bool is_int4(const Tensor& codes, const Tensor& params, int64_t hd) {
  const bool int4 = codes.size(3) != hd;
  TORCH_CHECK(codes.dim() == 4 && params.dim() == 4 && codes.scalar_type() == at::kByte &&
                  params.scalar_type() == at::kByte && (!int4 || (hd % 16 == 0 && codes.size(3) == hd / 2)) &&
                  params.size(3) == params_size(hd, int4) && codes.sizes().slice(0, 3) == params.sizes().slice(0, 3),
              "codes ", codes.sizes(), " and parameters ", params.sizes(), " don't fit a head of ", hd);
  return int4;
}

Tensor quantized_decode_attention(const Tensor& q, const Tensor& k_codes, const Tensor& k_params,
                                  const Tensor& v_codes, const Tensor& v_params, const optional<Tensor>& mask,
                                  double scaling, bool causal) {
  TORCH_CHECK(q.dim() == 4 && k_codes.dim() == 4 && k_codes.sizes() == v_codes.sizes() &&
                  q.size(0) == k_codes.size(0) && q.size(1) == k_codes.size(1),
              "quantized_decode_attention: q ", q.sizes(), ", keys ", k_codes.sizes(), ", values ", v_codes.sizes(),
              " don't fit");
  const bool int4 = is_int4(k_codes, k_params, q.size(3));
  is_int4(v_codes, v_params, q.size(3));
  const Tensor kc = with_rows(k_codes), kp = with_rows(k_params), vc = with_rows(v_codes), vp = with_rows(v_params);
  Attention a{};
  a.k = store(kc, kp), a.v = store(vc, vp), a.S = kc.size(2);
  return attention(a, q, mask, scaling, causal, int4 ? INT4 : INT8);
}

void quantize_append(Tensor& codes, Tensor& params, const Tensor& x, int64_t position) {
  TORCH_CHECK(x.dim() == 4 && codes.dim() == 4 && x.size(0) == codes.size(0) && x.size(1) == codes.size(1),
              "quantize_append: x ", x.sizes(), " and codes ", codes.sizes(), " don't fit");
  TORCH_CHECK(position >= 0 && position + x.size(2) <= codes.size(2), "quantize_append: ", x.size(2),
              " tokens at position ", position, " don't fit a store of ", codes.size(2));
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "quantize_append: x must be float32 or bfloat16, found ", x.scalar_type());
  TORCH_CHECK(codes.stride(3) == 1 && params.stride(3) == 1, "a row of codes or parameters must be contiguous");
  const bool int4 = is_int4(codes, params, x.size(3));
  const Tensor rows = with_rows(x);
  Append a{};
  a.x = rows.data_ptr(), a.x_batch = rows.stride(0), a.x_head = rows.stride(1), a.x_token = rows.stride(2);
  a.codes = codes.data_ptr<uint8_t>(), a.params = params.data_ptr<uint8_t>();
  a.codes_batch = codes.stride(0), a.codes_head = codes.stride(1), a.codes_token = codes.stride(2);
  a.params_batch = params.stride(0), a.params_head = params.stride(1), a.params_token = params.stride(2);
  a.codes += position * a.codes_token, a.params += position * a.params_token;
  a.nh = x.size(1), a.T = x.size(2), a.hd = x.size(3);
  const Kernels& run = kernels(int4 ? a.hd / GROUP : 0);
  Team::share(x.size(0) * a.nh * a.T, piece(a.hd * 256), [&](int64_t begin, int64_t end) {
    run.append(a, x.scalar_type() == at::kBFloat16, int4, begin, end);
  });
}

void norm(const Norm& a, bool bf16, int64_t rows) {
  Team::share(rows, piece(a.n * 4), [&](int64_t begin, int64_t end) { kernels().norm(a, bf16, begin, end); });
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK((bf16 || x.scalar_type() == at::kFloat) && weight.scalar_type() == x.scalar_type() && weight.dim() == 1 &&
                  x.dim() > 0 && x.size(-1) == weight.size(0),
              "rms_norm: x ", x.scalar_type(), x.sizes(), " and weight ", weight.scalar_type(), weight.sizes(),
              " don't fit");
  const Tensor rows = x.contiguous(), w = weight.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  const Norm a{rows.data_ptr(), w.data_ptr(), y.data_ptr(), w.size(0), static_cast<float>(eps)};
  if (y.numel() > 0) norm(a, bf16, rows_of(x));
  return y;
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || x.scalar_type() == at::kFloat, "rotary: x must be float32 or bfloat16");
  TORCH_CHECK(x.dim() == 4 && cos.sizes() == sin.sizes() && cos.dim() == 4 && cos.size(1) == 1 &&
                  cos.size(2) == x.size(2) && 2 * cos.size(3) <= x.size(3) &&
                  (cos.size(0) == 1 || cos.size(0) == x.size(0)),
              "rotary: x ", x.sizes(), " and angles ", cos.sizes(), " don't fit");
  const Tensor rows = with_rows(x), c = floats(cos), n = floats(sin);
  Rotary a{};
  a.x = rows.data_ptr(), a.x_batch = rows.stride(0), a.x_head = rows.stride(1), a.x_token = rows.stride(2);
  a.cos = c.data_ptr<float>(), a.sin = n.data_ptr<float>();
  a.nh = x.size(1), a.T = x.size(2), a.hd = x.size(3), a.half = c.size(3);
  a.angles_batch = c.size(0) == 1 ? 0 : a.T * a.half;
  Tensor y = at::empty(x.sizes(), x.options());
  a.y = y.data_ptr();
  Team::share(x.size(0) * a.nh * a.T, piece(a.hd * 8),
                   [&](int64_t begin, int64_t end) { kernels().rotary(a, bf16, begin, end); });
  return y;
}

bool has_kernel(const Tensor& weight) { return weight.scalar_type() == at::kBFloat16 || weight.scalar_type() == at::kChar; }

// What the blocks of a call write to in turn; allocated by the first of them.
struct Buffers {
  Tensor normed, qkv, attended, up, gate, sum;
  std::vector<float> partial;
  Rows rows;
};

Tensor& sized(Tensor& t, at::IntArrayRef sizes, const Tensor& like) {
  if (!t.defined() || t.sizes() != sizes) t = at::empty(sizes, like.options());
  return t;
}

// The addresses of number i of row r of a contiguous tensor, and of a token of a store.
char* at_row(const Tensor& t, int64_t r, int64_t i) {
  return static_cast<char*>(t.data_ptr()) + (r * t.size(-1) + i) * t.element_size();
}
char* at_token(const Tensor& t, int64_t b, int64_t h, int64_t token) {
  const int64_t number = b * t.stride(0) + h * t.stride(1) + token * t.stride(2);
  return static_cast<char*>(t.data_ptr()) + number * t.element_size();
}

// Rotates the new tokens' queries and keys, stores their keys and values, and attends: y (B, T, nh hd). The item of a
// head that reads a key stores it.
void attend_and_store(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const optional<Tensor>& query_scale,
                      at::TensorList stores, int64_t position, const optional<Tensor>& mask, double scaling,
                      bool causal, std::vector<float>& partial, Tensor& y) {
  const bool bf16 = qkv.scalar_type() == at::kBFloat16, plain = stores.size() == 2;
  const int64_t n = qkv.element_size();
  Attention a{};
  a.B = y.size(0), a.T = y.size(1), a.nh = stores[0].size(1), a.hd = y.size(2) / a.nh;
  a.S = position + a.T, a.causal = causal;
  a.scaling = static_cast<float>(scaling), a.q_bf16 = bf16, a.q_token = a.hd;  // of an item's own queries
  TORCH_CHECK(position >= 0, "decode_blocks: position is ", position);
  for (const Tensor& t : stores)
    TORCH_CHECK(t.dim() == 4 && t.size(0) == a.B && t.size(1) == a.nh && a.S <= t.size(2) && t.stride(3) == 1 &&
                    (!plain || (t.size(3) == a.hd && t.scalar_type() == qkv.scalar_type())),
                "decode_blocks: ", a.B, " rows of ", a.T, " tokens at position ", position, ", in ", a.nh, " heads of ",
                a.hd, " ", qkv.scalar_type(), ", don't fit a store of ", t.sizes(), " ", t.scalar_type());
  Kind kind = bf16 ? BF16 : F32;
  if (!plain) kind = is_int4(stores[0], stores[1], a.hd) ? INT4 : INT8, is_int4(stores[2], stores[3], a.hd);
  const Tensor &keys = stores[0], &key_params = stores[plain ? 0 : 1], &values = stores[plain ? 1 : 2];
  const Tensor& value_params = stores[plain ? 1 : 3];
  a.k = store(keys, key_params), a.v = store(values, value_params);
  set_mask(a, mask);
  TORCH_CHECK(cos.dim() == 4 && cos.sizes() == sin.sizes() && cos.size(2) == a.T && 2 * cos.size(3) <= a.hd &&
                  (cos.size(0) == 1 || cos.size(0) == a.B),
              "decode_blocks: angles ", cos.sizes(), " don't fit ", y.sizes());
  const Kernels& run = kernels(kind == INT4 ? a.hd / GROUP : 0);

  // Queries (third 0), keys (1) or values (2).
  const auto fresh = [&](int third, int64_t b, int64_t h, int64_t t) {
    return at_row(qkv, b * a.T + t, (third * a.nh + h) * a.hd);
  };
  const auto rotate = [&](const char* x, int64_t b, int64_t t, void* to) {
    const int64_t half = cos.size(3), angle = ((cos.size(0) == 1 ? 0 : b) * a.T + t) * half;
    Rotary one{};
    one.x = x, one.cos = cos.data_ptr<float>() + angle, one.sin = sin.data_ptr<float>() + angle, one.y = to;
    one.nh = one.T = 1, one.hd = a.hd, one.half = half;
    run.rotary(one, bf16, 0, 1);
  };
  const auto write = [&](const char* x, int64_t b, int64_t h, int64_t t, const Tensor& rows, const Tensor& params) {
    char* to = at_token(rows, b, h, position + t);
    if (plain) return static_cast<void>(std::memcpy(to, x, a.hd * n));
    Append one{};
    one.x = x, one.codes = reinterpret_cast<uint8_t*>(to), one.nh = one.T = 1, one.hd = a.hd;
    one.params = reinterpret_cast<uint8_t*>(at_token(params, b, h, position + t));
    run.append(one, bf16, kind == INT4, 0, 1);
  };
  attend(a, kind, y, partial, [&](const auto& attend_item, int64_t item) {
    const int64_t b = item / a.splits / a.nh, h = item / a.splits % a.nh, split = item % a.splits;
    std::vector<char> key(a.hd * n), queries(a.T * a.hd * n);
    for (int64_t t = std::max<int64_t>(0, a.first_key(split) - position); t < a.first_key(split + 1) - position; ++t) {
      rotate(fresh(1, b, h, t), b, t, key.data());
      write(key.data(), b, h, t, keys, key_params);
      write(fresh(2, b, h, t), b, h, t, values, value_params);
    }
    for (int64_t t = 0; t < a.T; ++t) {
      char* q = queries.data() + t * a.hd * n;
      rotate(fresh(0, b, h, t), b, t, q);
      if (!query_scale) continue;
      const float factor = query_scale->data_ptr<float>()[(query_scale->size(0) == 1 ? 0 : b) * a.T + t];
      const auto scale = [&](auto* x) { for (int64_t c = 0; c < a.hd; ++c) x[c] = x[c] * factor; };
      bf16 ? scale(reinterpret_cast<BFloat16*>(q)) : scale(reinterpret_cast<float*>(q));
    }
    Attention own = a;
    own.q = queries.data();
    attend_item(own, item);
  });
}

// A block for a few tokens behind a filled cache, in place; qwen_ops.py has the same in PyTorch. Between two stages all
// threads wait for the last: what a thread can do with what it has made itself is done within the stage.
void one_block(Tensor& x, Buffers& buffers, at::TensorList norms, const c10::List<optional<Tensor>>& matrices,
               at::IntArrayRef formats, int64_t block, const Tensor& cos, const Tensor& sin,
               const optional<Tensor>& query_scale, at::TensorList store, int64_t position,
               const optional<Tensor>& mask, double eps, double scaling, bool causal) {
  const int64_t B = x.size(0), T = x.size(1), nh = store[0].size(1);
  const auto dtype = x.scalar_type();
  const bool bf16 = dtype == at::kBFloat16;
  Rows& rows = buffers.rows;
  // y (B, T, out) becomes rows times matrix i.
  const auto times = [&](int i, Tensor& y) -> Product {
    const auto part = [&](int j) { return matrices.get(25 * block + 5 * i + j); };
    const int64_t* format = formats.data() + 15 * block + 3 * i;
    const int64_t bits = format[0], group_size = format[1], zero_offset = format[2];
    const Tensor weight = *part(0);
    const optional<Tensor> bias = part(1), scale = part(2), zeros = part(3), g_idx = part(4);
    const int64_t out = weight.size(bits ? 1 : 0);
    void* to = sized(y, {B, T, out}, x).data_ptr();
    if (rows.number <= 8 && bits)
      return gptq_product(rows, weight, *zeros, *scale, g_idx, bits, group_size, zero_offset, bias, to, dtype);
    if (rows.number <= 8 && has_kernel(weight)) return linear_product(rows, weight, bias, scale, to);
    const Tensor inputs = rows.tensor;  // PyTorch's product, of many rows or other weights, is not in pieces
    return {out, out, 0, [=](int64_t, int64_t) {
              y.copy_(bits    ? gptq_linear(inputs, weight, *zeros, *scale, g_idx, bits, group_size, zero_offset, bias)
                      : scale ? linear(inputs, weight, bias, scale)
                              : has_kernel(weight) ? linear(inputs, weight, bias, scale)
                              : at::linear(inputs, weight, bias));
            }};
  };
  const auto take_normed = [&](const Tensor& weight) {
    TORCH_CHECK(weight.scalar_type() == dtype && weight.is_contiguous() && weight.numel() == x.size(2),
                "decode_blocks: a norm of ", weight.scalar_type(), weight.sizes(), " doesn't fit x ", dtype, x.sizes());
    Tensor& y = sized(buffers.normed, x.sizes(), x);
    norm({x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.size(2), static_cast<float>(eps)}, bf16, B * T);
    rows.take(y);
  };
  // Outputs [begin, end) of every row: x += sum, up *= silu(gate).
  const auto add_to_x = [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < B * T; ++r)
      kernels().add(at_row(buffers.sum, r, begin), bf16, end - begin, at_row(x, r, begin));
  };
  const auto gate = [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < B * T; ++r)
      kernels().gate(at_row(buffers.gate, r, begin), bf16, end - begin, at_row(buffers.up, r, begin));
  };

  take_normed(norms[0]);
  multiply({times(0, buffers.qkv)}, nothing);
  TORCH_CHECK(nh > 0 && buffers.qkv.size(2) % (3 * nh) == 0, "decode_blocks: c_attn has ", buffers.qkv.size(2),
              " outputs, which are not those of ", nh, " heads");
  Tensor& y = sized(buffers.attended, {B, T, buffers.qkv.size(2) / 3}, x);
  attend_and_store(buffers.qkv, cos, sin, query_scale, store, position, mask, scaling, causal, buffers.partial, y);
  rows.take(y);
  multiply({times(1, buffers.sum)}, add_to_x);

  take_normed(norms[1]);
  multiply({times(2, buffers.up), times(3, buffers.gate)}, gate);
  rows.take(buffers.up);
  multiply({times(4, buffers.sum)}, add_to_x);
}

// One block after the other; the lists hold what belongs to the first, then to the second, and so on.
Tensor decode_blocks(const Tensor& input, at::TensorList norms, const c10::List<optional<Tensor>>& matrices,
                     at::IntArrayRef formats, const Tensor& cos, const Tensor& sin, const optional<Tensor>& query_scale,
                     at::TensorList store, int64_t position, const optional<Tensor>& mask, double eps,
                     at::ArrayRef<double> scaling, bool causal) {
  const int64_t blocks = norms.size() / 2, number = store.size();
  const int64_t tensors = matrices.size(), numbers = formats.size();
  TORCH_CHECK(blocks > 0 && norms.size() % 2 == 0 && tensors == 25 * blocks && numbers == 15 * blocks &&
                  number % blocks == 0 && static_cast<int64_t>(scaling.size()) == blocks,
              "decode_blocks: ", norms.size(), " norms, ", tensors, " tensors and ", numbers,
              " numbers of matrices, ", number, " tensors of a store and ", scaling.size(),
              " scales are not those of whole blocks");
  // PyTorch's products, of many rows or other weights, have threads of their own.
  bool native = input.dim() == 3 && input.size(0) * input.size(1) <= 8;
  for (int64_t i = 0; native && i < 5 * blocks; ++i) native = formats[3 * i] != 0 || has_kernel(*matrices.get(5 * i));
  TORCH_CHECK(input.scalar_type() == at::kFloat || input.scalar_type() == at::kBFloat16,
              "decode_blocks: x must be float32 or bfloat16, found ", input.scalar_type());
  Tensor x = input.clone(at::MemoryFormat::Contiguous);
  const Tensor c = floats(cos), n = floats(sin);
  const optional<Tensor> scale = query_scale ? optional<Tensor>(floats(*query_scale)) : query_scale;
  Buffers buffers;
  const auto run = [&] {
    for (int64_t i = 0; i < blocks; ++i)
      one_block(x, buffers, norms.slice(2 * i, 2), matrices, formats, i, c, n, scale,
                store.slice(number / blocks * i, number / blocks), position, mask, eps, scaling[i], causal);
  };
  native ? Team::with(run) : run();
  return x;
}

TORCH_LIBRARY_IMPL(QWEN_NAMESPACE, CPU, m) {
  m.impl("linear", linear);
  m.impl("gptq_linear", gptq_linear);
  m.impl("gptq_dequantize", gptq_dequantize);
  m.impl("decode_attention", decode_attention);
  m.impl("quantize_append", quantize_append);
  m.impl("quantized_decode_attention", quantized_decode_attention);
  m.impl("rms_norm", rms_norm);
  m.impl("rotary", rotary);
  m.impl("decode_blocks", decode_blocks);
}

TORCH_LIBRARY_FRAGMENT(QWEN_NAMESPACE, m) { m.def("cpu_level(str name) -> str", cpu_level); }

#endif

#endif

}  // namespace qwen_kernels

#else  // --- part two: the kernels, for one instruction set ----------------------------------------------------------

namespace QWEN_LEVEL {

#define INLINE inline __attribute__((always_inline))

constexpr int W = QWEN_WIDTH;
// Bytes: a cache line, how far ahead memory is asked for. It is asked into the second cache: with the first one, where x
// is, a core of a Zen 4 read half as fast.
constexpr int LINE = 64, AHEAD = 8192;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));

template <class V, class T>
INLINE V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// W numbers of 16 or 8 bits as 32-bit integers.
#if QWEN_WIDTH == 16
INLINE vi widen(const BFloat16* p) { return (vi)_mm512_cvtepu16_epi32(read<__m256i>(p)); }
INLINE vi widen(const uint8_t* p) { return (vi)_mm512_cvtepu8_epi32(read<__m128i>(p)); }
INLINE vi widen(const int8_t* p) { return (vi)_mm512_cvtepi8_epi32(read<__m128i>(p)); }
#elif QWEN_WIDTH == 8
INLINE vi widen(const BFloat16* p) { return (vi)_mm256_cvtepu16_epi32(read<__m128i>(p)); }
INLINE vi widen(const uint8_t* p) { return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(read<int64_t>(p))); }
INLINE vi widen(const int8_t* p) { return (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read<int64_t>(p))); }
#elif defined(__aarch64__)
INLINE vi widen(const BFloat16* p) { return (vi)vmovl_u16(vld1_u16(&p->x)); }
INLINE vi widen(const uint8_t* p) { return (vi)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(read<uint32_t>(p))))); }
INLINE vi widen(const int8_t* p) { return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(read<uint32_t>(p))))); }
#else
INLINE vi widen(const BFloat16* p) { return vi{p[0].x, p[1].x, p[2].x, p[3].x}; }
INLINE vi widen(const uint8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
INLINE vi widen(const int8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
#endif

INLINE vf load(const float* p) { return read<vf>(p); }
INLINE vf load(const BFloat16* p) { return (vf)(widen(p) << 16); }
INLINE vf load(const uint8_t* p) { return __builtin_convertvector(widen(p), vf); }
INLINE vf load(const int8_t* p) { return __builtin_convertvector(widen(p), vf); }

INLINE void save(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE void save(BFloat16* p, vf v) {  // to the nearest, halves to even
  typedef uint16_t half __attribute__((vector_size(2 * W)));
  const vi bits = (vi)v, nearest = bits + 0x7fff + ((bits >> 16) & 1), nan = v != v;
  const half h = __builtin_convertvector(((~nan & nearest) | (nan & 0x7fc00000)) >> 16, half);
  std::memcpy(p, &h, sizeof h);
}
INLINE vf all(float x) { return x - vf{}; }  // which compilers know to be x, unlike x + 0

INLINE vf fma(vf a, vf b, vf c) {
#if QWEN_WIDTH == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif QWEN_WIDTH == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

INLINE float sum(vf v) {
#if QWEN_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s[W];
  save(s, v);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
#endif
}

// To the nearest integer, halves to even; |x| below 2^22.
INLINE vf round(vf x) { return (x + 12582912.f) - 12582912.f; }
INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf minimum(vf a, vf b) { return select(a < b, a, b); }
INLINE vf maximum(vf a, vf b) { return select(a > b, a, b); }

INLINE float largest(vf v) {
  float x = v[0];
  for (int i = 1; i < W; ++i) x = std::max(x, v[i]);
  return x;
}

// exp for x <= 0, exact to 2 units in the last place; 0 below -87.
INLINE vf exp(vf x) {
  const vi tiny = x < -87.f;
  x = select(tiny, vf{}, x);
  const vf n = round(x * 1.44269504f);
  const vf r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));  // x - n log 2
  vf y = fma(r, all(1.f / 5040), all(1.f / 720));
  y = fma(y, r, all(1.f / 120));
  y = fma(y, r, all(1.f / 24));
  y = fma(y, r, all(1.f / 6));
  y = fma(y, r, all(.5f));
  y = fma(y, r, all(1.f));
  y = fma(y, r, all(1.f));
  return select(tiny, vf{}, y * (vf)((__builtin_convertvector(n, vi) + 127) << 23));
}

// Products of R rows a with C rows b, out[c * R + r]. Vectors of both are read once for C * R products. The rows b
// come from memory: `ahead` numbers before they are needed they are asked for.
template <int R, int C, class A, class B>
INLINE void dots(const A* a, int64_t a_stride, const B* b, int64_t b_stride, int64_t ahead, int64_t n, float* out) {
  constexpr int U = LINE / (W * sizeof(B));             // vectors to a cache line
  constexpr int N = std::min(U, std::max(1, 4 / R / C));  // independent sums hide how long an addition takes
  vf acc[N][C][R] = {};
  int64_t k = 0;
  for (; k + U * W <= n; k += U * W) {
    for (int c = 0; c < C; ++c) __builtin_prefetch(b + c * b_stride + k + ahead, 0, 2);
    for (int u = 0; u < U; ++u) {
      vf x[R];
      for (int r = 0; r < R; ++r) x[r] = load(a + r * a_stride + k + u * W);
      for (int c = 0; c < C; ++c) {
        const vf y = load(b + c * b_stride + k + u * W);
        for (int r = 0; r < R; ++r) acc[u % N][c][r] = fma(x[r], y, acc[u % N][c][r]);
      }
    }
  }
  for (; k + W <= n; k += W)
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r)
        acc[0][c][r] = fma(load(a + r * a_stride + k), load(b + c * b_stride + k), acc[0][c][r]);
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      for (int u = 1; u < N; ++u) acc[0][c][r] += acc[u][c][r];
      float y = sum(acc[0][c][r]);
      for (int64_t i = k; i < n; ++i)
        y += static_cast<float>(a[r * a_stride + i]) * static_cast<float>(b[c * b_stride + i]);
      out[c * R + r] = y;
    }
}

#ifdef QWEN_BF16  // the same for bfloat16 of both, two products an element
#if QWEN_WIDTH == 16
typedef __m512bh pairs;
INLINE pairs load_pairs(const BFloat16* p, int64_t left) {  // zeros behind those that are left
  return (pairs)_mm512_maskz_loadu_epi16(left >= 2 * W ? 0xffffffff : (1u << left) - 1, p);
}
INLINE vf dot(pairs a, pairs b, vf c) { return (vf)_mm512_dpbf16_ps((__m512)c, a, b); }
#else
typedef uint16_t pairs __attribute__((vector_size(4 * W)));
INLINE pairs load_pairs(const BFloat16* p, int64_t left) {
  if (left >= 2 * W) return read<pairs>(p);
  pairs v{};
  std::memcpy(&v, p, left * sizeof(BFloat16));
  return v;
}
INLINE vf dot(pairs a, pairs b, vf c) {  // compilers differ in whether their headers have it here
  asm("bfdot %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
  return c;
}
#endif

template <int R, int C>
INLINE void add_pairs(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t b_stride, int64_t left,
                      vf (*acc)[R]) {
  pairs x[R];
  for (int r = 0; r < R; ++r) x[r] = load_pairs(a + r * a_stride, left);
  for (int c = 0; c < C; ++c) {
    const pairs y = load_pairs(b + c * b_stride, left);
    for (int r = 0; r < R; ++r) acc[c][r] = dot(x[r], y, acc[c][r]);
  }
}

template <int R, int C>
INLINE void dots(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t b_stride, int64_t ahead, int64_t n,
                 float* out) {
  constexpr int U = LINE / (4 * W), N = std::max(1, 4 / R / C), M = std::max(U, N);
  vf acc[N][C][R] = {};
  int64_t k = 0;
  for (; k + 2 * W * M <= n; k += 2 * W * M)
    for (int u = 0; u < M; ++u) {
      const int64_t i = k + 2 * W * u;
      if (u % U == 0)
        for (int c = 0; c < C; ++c) __builtin_prefetch(b + c * b_stride + i + ahead, 0, 2);
      add_pairs<R, C>(a + i, a_stride, b + i, b_stride, 2 * W, acc[u % N]);
    }
  for (int u = 0; k < n; k += 2 * W, ++u) add_pairs<R, C>(a + k, a_stride, b + k, b_stride, n - k, acc[u % N]);
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) {
      for (int u = 1; u < N; ++u) acc[0][c][r] += acc[u][c][r];
      out[c * R + r] = sum(acc[0][c][r]);
    }
}
#endif

// --- linear -------------------------------------------------------------------------------------------------------

template <int R, int C>
INLINE void write_channels(const Linear& a, int64_t channel, const float* y) {
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < std::min<int64_t>(R, a.rows); ++r) {
      float result = y[c * R + r];
      if (a.bias)
        result += a.bf16_bias ? static_cast<float>(static_cast<const BFloat16*>(a.bias)[channel + c])
                              : static_cast<const float*>(a.bias)[channel + c];
      const int64_t i = r * a.out + channel + c;
      if (a.bf16_out)
        static_cast<BFloat16*>(a.y)[i] = result;
      else
        static_cast<float*>(a.y)[i] = result;
    }
}

template <int R, int C, class X, class T>
INLINE void linear_block(const Linear& a, int64_t channel, int64_t ahead) {
  const X* x = static_cast<const X*>(a.x);
  const T* w = static_cast<const T*>(a.weight) + channel * a.weight_stride;
  float y[C * R] = {};
  if (a.scale) {
    const int64_t n = a.in / a.groups;
    for (int64_t g = 0; g < a.groups; ++g) {
      float part[C * R];
      dots<R, C>(x + g * n, a.in, w + g * n, a.weight_stride, ahead, n, part);
      for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) y[c * R + r] += a.scale[(channel + c) * a.groups + g] * part[c * R + r];
    }
  } else {
    dots<R, C>(x, a.in, w, a.weight_stride, ahead, a.in, y);
  }
  write_channels<R, C>(a, channel, y);
}

// x in whole steps, which are a power of two for each segment, so that its largest number has 15 bits. Of bfloat16,
// which has 8, numbers from 2^-7 of the largest on are kept as they are; others are off by half a step, 2^-15 of the
// largest, at most. The steps of a segment that is not finite are NaN.
#ifndef QWEN_BF16
void whole_steps(const BFloat16* rows, const Linear& a, int16_t* numbers, float* steps) {
  typedef int16_t half __attribute__((vector_size(2 * W)));
  const int64_t padded = padded_rows(a.rows);
  for (int64_t first = 0; first < a.in; first += SEGMENT)
    for (int64_t r = 0; r < padded; ++r, ++steps, numbers += SEGMENT) {
      const BFloat16* x = rows + r * a.in + first;
      uint16_t largest = 0;
      for (int64_t i = 0; r < a.rows && i < SEGMENT; ++i) largest = std::max<uint16_t>(largest, x[i].x & 0x7fff);
      const int exponent = largest >> 7;
      if (exponent <= 14 || exponent == 255) {  // the step would be no normal number, or there is none
        *steps = exponent == 255 ? std::numeric_limits<float>::quiet_NaN() : 0.f;
        std::fill_n(numbers, SEGMENT, 0);
        continue;
      }
      *steps = ((vf)(vi{} + ((exponent - 14) << 23)))[0];
      const vf inverse = (vf)(vi{} + ((268 - exponent) << 23));
      for (int64_t i = 0; i < SEGMENT; i += W) {
        const half h = __builtin_convertvector(__builtin_convertvector(round(load(x + i) * inverse), vi), half);
        std::memcpy(numbers + i, &h, sizeof h);
      }
    }
}
#endif

typedef int16_t vh __attribute__((vector_size(4 * W)));

INLINE vh widen_to_halves(const int8_t* p) {
#if QWEN_WIDTH == 16
  return (vh)_mm512_cvtepi8_epi16(read<__m256i>(p));
#elif QWEN_WIDTH == 8
  return (vh)_mm256_cvtepi8_epi16(read<__m128i>(p));
#elif defined(__aarch64__)
  return (vh)vmovl_s8(vld1_s8(p));
#elif defined(__x86_64__)
  const __m128i twice = _mm_cvtsi64_si128(read<int64_t>(p));
  return (vh)_mm_srai_epi16(_mm_unpacklo_epi8(twice, twice), 8);
#else
  return vh{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
#endif
}

// A number that compilers see no further than: they would read x from memory for each output, and first multiply and
// then add up, for which there are too few registers.
template <class V>
INLINE void hide(V& v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}

// Adds two products to each lane.
INLINE void add_products(vh a, vh b, vi& sums) {
#if QWEN_WIDTH == 16 && defined(QWEN_BF16)
  sums = (vi)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif defined(__aarch64__)
  const int32x4_t low = vmlal_s16((int32x4_t)sums, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  sums = (vi)vmlal_high_s16(low, (int16x8_t)a, (int16x8_t)b);
#elif defined(__x86_64__)
#if QWEN_WIDTH == 16
  sums += (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif QWEN_WIDTH == 8
  sums += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  sums += (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
  hide(sums);
#else
  for (int i = 0; i < 2 * W; ++i) sums[i / 2] += a[i] * b[i];
#endif
}

// int8 times x in whole steps, of C channels `apart` from each other: sums within a segment are exact, as a lane has at
// most SEGMENT products of 2^15 * 2^7.
template <int R, int C>
INLINE void whole_block(const Linear& a, int64_t channel, int64_t apart, int64_t ahead) {
  constexpr int Q = std::min(R, 4);  // rows at a time, whose sums fit into registers
  const int8_t* w[C];
  for (int c = 0; c < C; ++c) w[c] = static_cast<const int8_t*>(a.weight) + (channel + c * apart) * a.weight_stride;
  const int16_t* x = a.numbers;
  const float* steps = a.steps;
  vf total[C][R] = {};
  int64_t first = 0;
  for (int64_t g = 0; g < a.groups; ++g) {
    vf part[C][R] = {};
    for (int64_t segments = a.in / a.groups / SEGMENT; segments > 0; --segments, first += SEGMENT)
      for (int q = 0; q < R; q += Q, x += Q * SEGMENT, steps += Q) {
        vi sums[C][Q] = {};
        for (int line = 0; line < SEGMENT; line += LINE) {
          if (q == 0)
            for (int c = 0; c < C; ++c) __builtin_prefetch(w[c] + first + line + ahead, 0, 2);
          for (int u = 0; u < LINE / (2 * W); ++u) {
            const int k = line + u * 2 * W;
            vh codes[C];
            for (int c = 0; c < C; ++c) codes[c] = widen_to_halves(w[c] + first + k);
            for (int r = 0; r < Q; ++r) {
              vh numbers = read<vh>(x + r * SEGMENT + k);
              hide(numbers);
              for (int c = 0; c < C; ++c) add_products(numbers, codes[c], sums[c][r]);
            }
          }
        }
        for (int r = 0; r < Q; ++r)
          for (int c = 0; c < C; ++c)
            part[c][q + r] = fma(__builtin_convertvector(sums[c][r], vf), all(steps[r]), part[c][q + r]);
      }
    for (int c = 0; c < C; ++c)
      for (int r = 0; r < R; ++r)
        total[c][r] = fma(part[c][r], all(a.scale[(channel + c * apart) * a.groups + g]), total[c][r]);
  }
  for (int c = 0; c < C; ++c) {
    float y[R];
    for (int r = 0; r < R; ++r) y[r] = sum(total[c][r]);
    write_channels<R, 1>(a, channel + c * apart, y);
  }
}

// Two channels that are half of the piece apart: a CPU asks for memory ahead by itself, but not beyond a page, so that
// two places at once are read up to a third faster than one.
template <int R>
void whole_channels(const Linear& a, int64_t begin, int64_t end) {
  const int64_t half = (end - begin) / 2, step = std::max<int64_t>(1, a.weight_stride);
  const int64_t ahead = (AHEAD + step - 1) / step * step;
  for (int64_t channel = begin; channel < begin + half; ++channel) whole_block<R, 2>(a, channel, half, ahead);
  for (int64_t channel = begin + 2 * half; channel < end; ++channel) whole_block<R, 1>(a, channel, 0, ahead);
}

template <int R, class X, class T>
void linear_channels(const Linear& a, int64_t begin, int64_t end) {
  constexpr int C = R == 1 ? 1 : 2;
  // Whole steps of C channels, so that every line is asked for once.
  const int64_t step = std::max<int64_t>(1, C * a.weight_stride), distance = AHEAD / sizeof(T);
  const int64_t ahead = (distance + step - 1) / step * step;
  int64_t channel = begin;
  for (; channel + C <= end; channel += C) linear_block<R, C, X, T>(a, channel, ahead);
  for (; channel < end; ++channel) linear_block<R, 1, X, T>(a, channel, ahead);
}

// f with the number of rows, rounded up to a power of two.
template <class F>
INLINE void with_rows(const Linear& a, const F& f) {
  if (a.rows == 1)
    f(std::integral_constant<int, 1>());
  else if (a.rows == 2)
    f(std::integral_constant<int, 2>());
  else if (a.rows <= 4)
    f(std::integral_constant<int, 4>());
  else
    f(std::integral_constant<int, 8>());
}

template <class X, class T>
void linear_rows(const Linear& a, int64_t begin, int64_t end) {
  with_rows(a, [&](auto rows) { linear_channels<decltype(rows)::value, X, T>(a, begin, end); });
}

void linear(const Linear& a, bool int8, int64_t begin, int64_t end) {
  if (a.numbers) return with_rows(a, [&](auto rows) { whole_channels<decltype(rows)::value>(a, begin, end); });
#ifdef QWEN_BF16
  linear_rows<BFloat16, BFloat16>(a, begin, end);
#else
  int8 ? linear_rows<float, int8_t>(a, begin, end) : linear_rows<float, BFloat16>(a, begin, end);
#endif
}

#if !defined(QWEN_BF16) || QWEN_WIDTH == 16  // the rest of neon_bf16 is that of neon

// --- matrices in 4 and 8 bits -------------------------------------------------------------------------------------
//
// A vector is W outputs: of an integer each, n inputs. Codes are multiplied as they are, and a segment's sum is scaled:
// scale * (sum of x * code - zero * sum of x).

// The W codes `shift` bits up.
template <int BITS>
INLINE vf codes_at(vi words, int shift) {
#if QWEN_WIDTH == 16
  if (BITS == 4) {
    static const float VALUES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return (vf)_mm512_permutexvar_ps((__m512i)(words >> shift), _mm512_loadu_ps(VALUES));
  }
#endif
  return __builtin_convertvector((words >> shift) & ((1 << BITS) - 1), vf);
}

// float16 as float32. Infinities and NaNs, whose exponent is all ones, come out as 65536 or more: float16 has no such
// number, so they can be told by it.
INLINE vf load_half(const uint16_t* p) {
  const vi bits = widen(reinterpret_cast<const BFloat16*>(p));
  const vf x = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
  const vi beyond = x >= 65536.f;
  return (vf)((vi)x | (beyond & 0x7f800000) | ((bits & 0x8000) << 16));
}

INLINE float one_half(uint16_t h) {
  const uint32_t bits = (h & 0x7fffu) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 0x1p112f;
  if (x >= 65536.f) x = h & 0x3ff ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  return h & 0x8000 ? -x : x;
}

INLINE float one_zero(const Gptq& a, int64_t group, int64_t channel) {
  const int n = 32 / a.bits, mask = (1 << a.bits) - 1;
  const uint32_t word = a.qzeros[group * a.qzeros_stride + channel / n];
  return ((word >> (channel % n * a.bits) & mask) + a.zero_offset) & mask;
}

// Zeros of W outputs from a multiple of W on.
template <int BITS>
INLINE vf zeros_at(const Gptq& a, int64_t group, int64_t channel) {
  constexpr int N = 32 / BITS;
  static const int32_t LANES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vi lane = read<vi>(LANES), shifts = (lane + static_cast<int>(channel % N)) % N * BITS;
  const int32_t* p = a.qzeros + group * a.qzeros_stride + channel / N;
  vi words = vi{} + p[0];
  for (int i = N; i < W; i += N) words = (vi)select(lane < i, (vf)words, (vf)(vi{} + p[i / N]));
  return __builtin_convertvector(((words >> shifts) + a.zero_offset) & ((1 << BITS) - 1), vf);
}

#ifndef QWEN_BF16
INLINE float one_code(const Gptq& a, int64_t i, int64_t channel) {
  const int n = 32 / a.bits;
  const uint32_t word = a.qweight[i / n * a.qweight_stride + channel];
  return word >> (i % n * a.bits) & ((1 << a.bits) - 1);
}

// Adds the products of U integers of codes, inputs from i on, to the sums (R, TILE) of `width` outputs from `channel` on.
template <int R, int BITS, int U>
INLINE void gptq_block(const Gptq& a, int64_t i, int64_t channel, int64_t width, float* sums) {
  constexpr int N = 32 / BITS;
  const int32_t* q = a.qweight + i / N * a.qweight_stride + channel;
  const int64_t ahead = std::max<int64_t>(U, AHEAD / 4 / width);  // rows
  for (int64_t o = 0; o < width; o += W) {
    vf acc[R];
    for (int r = 0; r < R; ++r) acc[r] = load(sums + r * TILE + o);
    for (int u = 0; u < U; ++u) {
      const vi words = read<vi>(q + u * a.qweight_stride + o);
      __builtin_prefetch(q + (ahead + u) * a.qweight_stride + o, 0, 2);
      for (int j = 0; j < N; ++j) {
        const vf codes = codes_at<BITS>(words, BITS * j);
        for (int r = 0; r < R; ++r) acc[r] = fma(codes, all(a.x[r * a.in + i + u * N + j]), acc[r]);
      }
    }
    for (int r = 0; r < R; ++r) save(sums + r * TILE + o, acc[r]);
  }
}

// The outputs from `channel` on that fill no vector.
template <int R>
void gptq_rest(const Gptq& a, int64_t channel, int64_t end) {
  for (; channel < end; ++channel)
    for (int64_t i = 0; i < a.in; ++i) {
      const int64_t g = a.g_idx ? a.g_idx[i] : i / a.group_size;
      const float w = one_half(a.scales[g * a.scales_stride + channel]) * (one_code(a, i, channel) - one_zero(a, g, channel));
      for (int r = 0; r < R; ++r) a.y[r * a.out + channel] += w * a.x[r * a.in + i];
    }
}

// The integers of a row lie side by side in memory, so a tile of outputs goes through a few rows at once.
template <int R, int BITS>
void gptq_channels(const Gptq& a, int64_t begin, int64_t end) {
  constexpr int N = 32 / BITS, U = 4;
  const int64_t whole = begin + (end - begin) / W * W;
  int64_t segments = 0;
  for (int64_t g = 0; g < a.in; g += a.group_size)
    segments += (std::min(a.in, g + a.group_size) - g + SEGMENT - 1) / SEGMENT;
  for (int64_t channel = begin; channel < whole; channel += TILE) {
    const int64_t width = std::min(TILE, whole - channel);
    for (int64_t group = 0, segment = 0; group < a.groups; ++group) {
      const int64_t last = std::min(a.in, (group + 1) * a.group_size);
      for (int64_t i = group * a.group_size; i < last; ++segment) {
        const int64_t stop = std::min(last, i + SEGMENT);
        float sums[R * TILE] = {};
        for (; i + U * N <= stop; i += U * N) gptq_block<R, BITS, U>(a, i, channel, width, sums);
        for (; i < stop; i += N) gptq_block<R, BITS, 1>(a, i, channel, width, sums);
        for (int64_t o = 0; o < width; o += W) {
          const vf scale = load_half(a.scales + group * a.scales_stride + channel + o);
          const vf zero = zeros_at<BITS>(a, group, channel + o);
          for (int r = 0; r < R; ++r) {
            float* y = a.y + r * a.out + channel + o;
            save(y, load(y) + scale * (load(sums + r * TILE + o) - zero * a.sums[r * segments + segment]));
          }
        }
      }
    }
  }
  gptq_rest<R>(a, whole, end);
}

// Inputs in groups of any order: a sum for each group.
template <int R, int BITS>
void gptq_in_any_order(const Gptq& a, int64_t begin, int64_t end) {
  constexpr int N = 32 / BITS;
  std::vector<float> buffer(a.groups * (R * W + R));
  float *sums = buffer.data(), *totals = sums + a.groups * R * W;
  for (int64_t i = 0; i < a.in; ++i)
    for (int r = 0; r < R; ++r) totals[a.g_idx[i] * R + r] += a.x[r * a.in + i];
  int64_t channel = begin;
  for (; channel + W <= end; channel += W) {
    std::fill(sums, totals, 0.f);
    for (int64_t i = 0; i < a.in; i += N) {
      const vi words = read<vi>(a.qweight + i / N * a.qweight_stride + channel);
      for (int j = 0; j < N; ++j) {
        const vf codes = codes_at<BITS>(words, BITS * j);
        float* to = sums + a.g_idx[i + j] * R * W;
        for (int r = 0; r < R; ++r) save(to + r * W, fma(codes, all(a.x[r * a.in + i + j]), load(to + r * W)));
      }
    }
    for (int64_t g = 0; g < a.groups; ++g) {
      const vf scale = load_half(a.scales + g * a.scales_stride + channel), zero = zeros_at<BITS>(a, g, channel);
      for (int r = 0; r < R; ++r) {
        float* y = a.y + r * a.out + channel;
        save(y, load(y) + scale * (load(sums + (g * R + r) * W) - zero * totals[g * R + r]));
      }
    }
  }
  gptq_rest<R>(a, channel, end);
}

template <int R>
void gptq_rows(const Gptq& a, int64_t begin, int64_t end) {
  if (a.g_idx)
    a.bits == 4 ? gptq_in_any_order<R, 4>(a, begin, end) : gptq_in_any_order<R, 8>(a, begin, end);
  else
    a.bits == 4 ? gptq_channels<R, 4>(a, begin, end) : gptq_channels<R, 8>(a, begin, end);
}

void gptq(const Gptq& a, int64_t begin, int64_t end) {
  if (a.rows == 1)
    gptq_rows<1>(a, begin, end);
  else if (a.rows == 2)
    gptq_rows<2>(a, begin, end);
  else if (a.rows <= 4)
    gptq_rows<4>(a, begin, end);
  else
    gptq_rows<8>(a, begin, end);
}

// x in fixed point: every segment's inputs in whole steps, of which the largest has 127 * 256^(places - 1). A number is
// written with `places` digits to the base 256, from -128 to 127, the highest first. Two places keep what bfloat16 and
// float16 have, three what float32 has: an input is off by at most 2^-16 or 2^-24 of the segment's largest.
// Inputs whose codes are in the lower halves of bytes come before the others.
void fixed_point(const float* x, const Gptq& a, int8_t* digits, float* steps, float* sums) {
  const float largest_number = a.places == 2 ? 127 * 256.f : 127 * 65536.f;
  const int64_t part = part_of(a.group_size), half = a.in / 2;
  for (int64_t first = 0; first < a.in; first += SEGMENT, ++steps) {
    vf high = vf{}, wrong = vf{};
    for (int64_t i = 0; i < SEGMENT; i += W) {
      const vf v = load(x + first + i);
      high = maximum(high, maximum(v, -v)), wrong += v - v;  // NaN for NaN and infinity
    }
    const float most = largest(high), step = most < 1e-30f ? 0.f : most / largest_number;
    const bool is_finite = sum(wrong) == 0;
    const vf inverse = all(step > 0 && is_finite ? largest_number / most : 0.f);
    *steps = is_finite ? step : std::numeric_limits<float>::quiet_NaN();
    int32_t numbers[SEGMENT];
    for (int64_t i = 0; i < SEGMENT; i += W) {
      vf v = load(x + first + i);
      v = is_finite ? v * inverse : vf{};
      v += select(v < 0.f, all(-.5f), all(.5f));
      const vi n = __builtin_convertvector(v, vi);
      std::memcpy(numbers + i, &n, sizeof n);
    }
    for (int64_t i = 0; i < SEGMENT; i += part) {
      int32_t total = 0;
      for (int64_t j = i; j < i + part; ++j) total += numbers[j];
      *sums++ = *steps * total;
    }
    for (int place = a.places - 1; place >= 0; --place) {
      int8_t* to = digits + place * a.in;
      int8_t lowest[SEGMENT];
      for (int64_t i = 0; i < SEGMENT; ++i) {
        lowest[i] = static_cast<int8_t>(numbers[i]);
        numbers[i] = (numbers[i] - lowest[i]) >> 8;
      }
      if (a.bits == 8)
        std::memcpy(to + first, lowest, SEGMENT);
      else
        for (int64_t i = 0; i < SEGMENT / 2; ++i)
          to[first / 2 + i] = lowest[2 * i], to[half + first / 2 + i] = lowest[2 * i + 1];
    }
  }
}
#endif

// --- outputs of which the codes lie side by side ------------------------------------------------------------------
//
// Digits of x are multiplied with codes as whole numbers, and added up exactly within a segment.

// Sums, within a segment, of products of codes from 0 with digits: a lane's are of its four bytes. SHORT: in 16 bits,
// two to a lane, where there are instructions for it; codes of 8 bits in halves, apart. Such a number gets at most 8
// products of at most 15 * 128: 4 of a vector with 4 bits, of which 2 fill a segment, or 2 of a vector with 8 bits.
template <int BITS, bool SHORT>
struct Sums {
  vi low = {}, high = {};

#if QWEN_WIDTH == 16 && defined(QWEN_BF16)
  INLINE void add(vi codes, vi digits) { low = (vi)_mm512_dpbusd_epi32((__m512i)low, (__m512i)codes, (__m512i)digits); }
  INLINE vi times(int factor) const { return low * factor; }
#else
  INLINE void add(vi codes, vi digits) {
    low = added(low, BITS == 4 ? codes : codes & 0x0f0f0f0f, digits);
    if (BITS == 8) high = added(high, codes >> 4 & 0x0f0f0f0f, digits);
  }
  INLINE vi times(int factor) const {
    return BITS == 4 ? widened(low, factor) : widened(low, factor) + widened(high, 16 * factor);
  }

 private:
#if QWEN_WIDTH == 16
  static INLINE vi added(vi sums, vi codes, vi digits) {
    const __m512i twos = _mm512_maddubs_epi16((__m512i)codes, (__m512i)digits);
    return SHORT ? (vi)_mm512_add_epi16((__m512i)sums, twos) : sums + (vi)_mm512_madd_epi16(twos, _mm512_set1_epi16(1));
  }
  static INLINE vi widened(vi sums, int factor) {
    return SHORT ? (vi)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(static_cast<int16_t>(factor))) : sums * factor;
  }
#elif QWEN_WIDTH == 8
  static INLINE vi added(vi sums, vi codes, vi digits) {
    const __m256i twos = _mm256_maddubs_epi16((__m256i)codes, (__m256i)digits);
    return SHORT ? (vi)_mm256_add_epi16((__m256i)sums, twos) : sums + (vi)_mm256_madd_epi16(twos, _mm256_set1_epi16(1));
  }
  static INLINE vi widened(vi sums, int factor) {
    return SHORT ? (vi)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(static_cast<int16_t>(factor))) : sums * factor;
  }
#else
#if defined(__aarch64__)
  static INLINE vi added(vi sums, vi codes, vi digits) {
    const int8x16_t a = (int8x16_t)codes, b = (int8x16_t)digits;
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return (vi)vpadalq_s16((int32x4_t)sums, vpaddq_s16(low, high));
  }
#else
  static INLINE vi added(vi sums, vi codes, vi digits) {
    int8_t a[4 * W], b[4 * W];
    std::memcpy(a, &codes, sizeof a), std::memcpy(b, &digits, sizeof b);
    for (int i = 0; i < 4 * W; ++i) sums[i / 4] += a[i] * b[i];
    return sums;
  }
#endif
  static INLINE vi widened(vi sums, int factor) { return sums * factor; }
#endif
#endif
};

// Of C outputs from `channel` on, y[c * R + r]: sums of scale * code * x. scales (parts, W), the first output's; lanes:
// where a vector has inputs of several parts, the scales of its lanes, (vectors, C, W), else null. WHOLE: a part is a
// segment, which a loop of known length is for.
template <int R, int C, int BITS, int P, bool WHOLE>
INLINE void by_output_block(const Gptq& a, int64_t channel, const float* scales, const float* lanes, float* y) {
  constexpr int64_t INPUTS = W * 32 / BITS;  // of a vector
  const int64_t part = WHOLE ? SEGMENT : part_of(a.group_size);
  const int64_t vectors = WHOLE ? SEGMENT / INPUTS : std::max(part, INPUTS) / INPUTS, segments = a.in / SEGMENT;
  // Sums of 16 bits while they fit into registers: those of 8 bits are twice as many.
  constexpr bool SHORT = R * C * P * BITS / 4 <= (W == 16 ? 24 : 16);
  const int8_t* codes[C];
  for (int c = 0; c < C; ++c) codes[c] = reinterpret_cast<const int8_t*>(a.qweight + (channel + c) * a.qweight_column);
  const int8_t* digits[R][P][2];  // as pointers for one row and two; those of more are sooner computed than kept
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p)
      for (int half = 0; half < 2; ++half) digits[r][p][half] = a.digits + (r * P + p) * a.in + half * (a.in / 2);
  vf acc[C][R] = {};
  int64_t byte = 0;
  for (int64_t first = 0; first < a.in; first += vectors * INPUTS, scales += W) {
    Sums<BITS, SHORT> sums[C][R][P];
    for (int64_t i = 0; i < vectors; ++i, byte += 4 * W) {
      vi words[C];
      for (int c = 0; c < C; ++c) {
        words[c] = read<vi>(codes[c] + byte);
        if (i % (LINE / (4 * W)) == 0) __builtin_prefetch(codes[c] + byte + AHEAD, 0, 2);
      }
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) {
          const int8_t* row = a.digits + (r * P + p) * a.in;
          const vi ones = read<vi>((R <= 2 ? digits[r][p][0] : row) + byte);
          for (int c = 0; c < C; ++c) sums[c][r][p].add(BITS == 4 ? words[c] & 0x0f0f0f0f : words[c], ones);
          if (BITS == 8) continue;
          const vi others = read<vi>((R <= 2 ? digits[r][p][1] : row + a.in / 2) + byte);
          for (int c = 0; c < C; ++c) sums[c][r][p].add(words[c] >> 4 & 0x0f0f0f0f, others);
        }
    }
    for (int c = 0; c < C; ++c) {
      const vf scale = !WHOLE && lanes ? load(lanes + c * W) : all(scales[c]);
      for (int r = 0; r < R; ++r) {
        vf total = __builtin_convertvector(sums[c][r][P - 2].times(256) + sums[c][r][P - 1].times(1), vf);
        if (P == 3) total = fma(__builtin_convertvector(sums[c][r][0].times(1), vf), all(65536.f), total);
        acc[c][r] = fma(total, scale * all(a.steps[r * segments + first / SEGMENT]), acc[c][r]);
      }
    }
    if (!WHOLE && lanes) lanes += C * W;
  }
  for (int c = 0; c < C; ++c)
    for (int r = 0; r < R; ++r) y[c * R + r] = sum(acc[c][r]);
}

template <int R, int BITS, int P>
void by_output(const Gptq& a, int64_t begin, int64_t end) {
  // One after the other in memory, unless rows of x are many to read again.
  constexpr int64_t C = R < 4 ? 1 : 2, INPUTS = W * 32 / BITS;
  const int64_t part = part_of(a.group_size), parts = a.in / part;
  std::vector<float> scales(parts * W), lanes(part < INPUTS ? a.in / INPUTS * C * W : 0);
  for (int64_t first = begin; first < end; first += W) {
    const int64_t width = std::min<int64_t>(W, end - first);
    float zeros[R][W] = {};
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t group = i * part / a.group_size;
      vf scale, zero;
      if (width == W) {
        scale = load_half(a.scales + group * a.scales_stride + first), zero = zeros_at<BITS>(a, group, first);
      } else {
        float some[2][W] = {};
        for (int64_t o = 0; o < width; ++o) {
          some[0][o] = one_half(a.scales[group * a.scales_stride + first + o]);
          some[1][o] = one_zero(a, group, first + o);
        }
        scale = load(some[0]), zero = load(some[1]);
      }
      save(scales.data() + i * W, scale);
      for (int r = 0; r < R; ++r) save(zeros[r], fma(scale * zero, all(a.sums[r * parts + i]), load(zeros[r])));
    }
    for (int64_t o = 0; o < width; o += C) {  // outputs are packed to integers, so their number is even
      if (!lanes.empty()) {
        const int64_t each = W * part / INPUTS;  // lanes of a part
        float* to = lanes.data();
        for (int64_t i = 0; i < parts; i += W / each)
          for (int64_t c = 0; c < C; ++c)
            for (int64_t j = 0; j < W / each; ++j, to += each)
              std::fill_n(to, each, scales[(i + j) * W + o + c]);
      }
      float y[C * R];
      if (part == SEGMENT)
        by_output_block<R, C, BITS, P, true>(a, first + o, scales.data() + o, nullptr, y);
      else
        by_output_block<R, C, BITS, P, false>(a, first + o, scales.data() + o, lanes.empty() ? nullptr : lanes.data(), y);
      for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) a.y[r * a.out + first + o + c] = y[c * R + r] - zeros[r][o + c];
    }
  }
}

template <int BITS>
void by_output_rows(const Gptq& a, int64_t begin, int64_t end) {
  // As many at a time as registers hold sums of; of float32 one: kernels for several would be as many again to build.
#ifdef QWEN_ROWS_AT_A_TIME  // tests ask every CPU for the rows of the widest
  constexpr int MOST = QWEN_ROWS_AT_A_TIME;
#else
  constexpr int MOST = W == 16 ? 8 : 2;
#endif
  const int64_t step = a.places == 3 ? 1 : std::min<int64_t>(padded_rows(a.rows), MOST), parts = a.in / part_of(a.group_size);
  const int64_t width = a.rows > step ? W : end - begin;  // outputs whose codes stay in the first cache for all rows
  for (int64_t first = begin; first < end; first += width) {
    const int64_t last = std::min(end, first + width);
    Gptq some = a;
    for (int64_t r = 0; r < a.rows; r += step) {
      if (a.places == 3)
        by_output<1, BITS, 3>(some, first, last);
      else if (step == 1)
        by_output<1, BITS, 2>(some, first, last);
      else if (step == 2)
        by_output<2, BITS, 2>(some, first, last);
      else if (step == 4)
        by_output<std::min(4, MOST), BITS, 2>(some, first, last);
      else
        by_output<MOST, BITS, 2>(some, first, last);
      some.digits += step * a.places * a.in, some.steps += step * (a.in / SEGMENT);
      some.sums += step * parts, some.y += step * a.out;
    }
  }
}

void gptq_by_output(const Gptq& a, int64_t begin, int64_t end) {
  a.bits == 4 ? by_output_rows<4>(a, begin, end) : by_output_rows<8>(a, begin, end);
}

#ifndef QWEN_BF16  // the rest is that of avx512

// --- matrices of codes, written out -------------------------------------------------------------------------------

// scale * (code - zero) for n codes of 8 bits.
template <class C, class T>
INLINE void write_codes(const C* codes, int64_t n, float scale, float zero, T* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) save(to + i, all(scale) * (load(codes + i) - all(zero)));
  for (; i < n; ++i) to[i] = scale * (codes[i] - zero);
}

// What each code of 4 bits stands for.
template <class T>
INLINE void fill_table(float scale, float zero, T* table) {
  static const uint8_t CODES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  write_codes(CODES, 16, scale, zero, table);
}

// The same for n codes of 4 bits, a multiple of 8 that a group's inputs have: looked up.
template <class T>
INLINE void write_halves(const uint8_t* codes, int64_t n, float scale, float zero, T* to) {
  alignas(64) T table[16];
  fill_table(scale, zero, table);
  int64_t i = 0;
#if QWEN_WIDTH == 16
  // A byte b becomes the bytes b and b >> 4, of which a look-up sees as many bits as it has entries.
  if constexpr (sizeof(T) == 2) {
    const __m512i values = _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
    for (; i + 32 <= n; i += 32) {
      const __m256i bytes = _mm256_cvtepu8_epi16(read<__m128i>(codes + i / 2));
      const __m512i indices = _mm512_cvtepu8_epi16(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)));
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(indices, values));
    }
  } else {
    const __m512 values = _mm512_load_ps(table);
    for (; i + 16 <= n; i += 16) {
      const __m128i bytes = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(read<int64_t>(codes + i / 2)));
      const __m512i indices = _mm512_cvtepu8_epi32(_mm_or_si128(bytes, _mm_slli_epi16(bytes, 4)));
      _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(indices, values));
    }
  }
#endif
  for (; i < n; i += 2) to[i] = table[codes[i / 2] & 15], to[i + 1] = table[codes[i / 2] >> 4];
}

template <class T>
void widen_rows(const Linear& a, int64_t begin, int64_t end) {
  const int64_t n = a.in / a.groups;
  for (int64_t o = begin; o < end; ++o)
    for (int64_t g = 0; g < a.groups; ++g)
      write_codes(static_cast<const int8_t*>(a.weight) + o * a.weight_stride + g * n, n, a.scale[o * a.groups + g], 0,
                  static_cast<T*>(a.widened) + o * a.in + g * n);
}

void widen(const Linear& a, bool bf16, int64_t begin, int64_t end) {
  bf16 ? widen_rows<BFloat16>(a, begin, end) : widen_rows<float>(a, begin, end);
}

// An output's codes, which lie one above the other, are first put side by side; those of some outputs at once, which
// share the lines of memory.
template <int BITS, class T>
void dequantize_outputs(const Gptq& a, int64_t begin, int64_t end) {
  constexpr int64_t N = 32 / BITS, C = 16;
  const int64_t words = a.in / N;
  const bool side_by_side = a.qweight_stride == 1;
  std::vector<int32_t> turned(side_by_side ? 0 : C * words);
  std::vector<float> scale(a.groups), zero(a.groups);
  std::vector<T> tables(a.g_idx && BITS == 4 ? 16 * a.groups : 0);
  for (int64_t first = begin; first < end; first += C) {
    const int64_t columns = std::min(C, end - first);
    for (int64_t r = 0; r < words && !side_by_side; ++r)
      for (int64_t c = 0; c < columns; ++c) turned[c * words + r] = a.qweight[r * a.qweight_stride + first + c];
    for (int64_t c = 0; c < columns; ++c) {
      const int32_t* column = side_by_side ? a.qweight + (first + c) * a.qweight_column : turned.data() + c * words;
      const uint8_t* codes = reinterpret_cast<const uint8_t*>(column);
      T* to = static_cast<T*>(a.weight) + (first + c) * a.in;
      for (int64_t g = 0; g < a.groups; ++g) {
        scale[g] = one_half(a.scales[g * a.scales_stride + first + c]), zero[g] = one_zero(a, g, first + c);
        const int64_t i = g * a.group_size, n = std::min(a.in - i, a.group_size);
        if (a.g_idx && BITS == 4)
          fill_table(scale[g], zero[g], tables.data() + 16 * g);
        else if (!a.g_idx && BITS == 4)
          write_halves(codes + i / 2, n, scale[g], zero[g], to + i);
        else if (!a.g_idx)
          write_codes(codes + i, n, scale[g], zero[g], to + i);
      }
      if (a.g_idx && BITS == 4)
        for (int64_t i = 0; i < a.in; ++i) to[i] = tables[16 * a.g_idx[i] + (codes[i / 2] >> i % 2 * 4 & 15)];
      else if (a.g_idx)
        for (int64_t i = 0; i < a.in; ++i) to[i] = scale[a.g_idx[i]] * (codes[i] - zero[a.g_idx[i]]);
    }
  }
}

void dequantize(const Gptq& a, bool bf16, int64_t begin, int64_t end) {
  if (a.bits == 4)
    bf16 ? dequantize_outputs<4, BFloat16>(a, begin, end) : dequantize_outputs<4, float>(a, begin, end);
  else
    bf16 ? dequantize_outputs<8, BFloat16>(a, begin, end) : dequantize_outputs<8, float>(a, begin, end);
}

// --- stores of keys and values ------------------------------------------------------------------------------------
//
// Each has: `scores`, products of a query with keys; `add`, values with weights p added to acc; `finish`, what acc
// still lacks. A query has `extra` numbers behind its hd channels, and acc has as many.

template <class T>
struct Plain {
  const T* rows;
  int64_t stride, hd;

  Plain(const Store& s, int64_t b, int64_t h, int64_t hd)
      : rows(reinterpret_cast<const T*>(s.rows + b * s.batch + h * s.head)), stride(s.token / sizeof(T)), hd(hd) {}

  static int64_t extra(int64_t) { return 0; }
  static void prepare(float*, int64_t) {}

  void scores(const float* q, int64_t key, int64_t n, float* out) const {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) dots<1, 4>(q, 0, rows + (key + i) * stride, stride, AHEAD / sizeof(T), hd, out + i);
    for (; i < n; ++i) dots<1, 1>(q, 0, rows + (key + i) * stride, stride, AHEAD / sizeof(T), hd, out + i);
  }

  template <int R>
  INLINE void add_rows(const float* p, int64_t key, float* acc) const {
    const T* row = rows + key * stride;
    int64_t c = 0;
    for (; c + W <= hd; c += W) {
      if (c * sizeof(T) % LINE == 0)
        for (int r = 0; r < R; ++r) __builtin_prefetch(row + r * stride + c + AHEAD / sizeof(T), 0, 2);
      vf y = load(acc + c);
      for (int r = 0; r < R; ++r) y = fma(all(p[r]), load(row + r * stride + c), y);
      save(acc + c, y);
    }
    for (; c < hd; ++c)
      for (int r = 0; r < R; ++r) acc[c] += p[r] * static_cast<float>(row[r * stride + c]);
  }

  void add(const float* p, int64_t key, int64_t n, float* acc) const {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) add_rows<8>(p + i, key + i, acc);
    for (; i < n; ++i) add_rows<1>(p + i, key + i, acc);
  }

  void finish(float*) const {}
};

// x = step * code + centre, one pair a row.
struct Codes8 : Plain<int8_t> {
  const char* params;
  int64_t params_stride;

  Codes8(const Store& s, int64_t b, int64_t h, int64_t hd)
      : Plain(s, b, h, hd), params(s.params + b * s.params_batch + h * s.params_head), params_stride(s.params_token) {}

  static int64_t extra(int64_t) { return 1; }
  static void prepare(float* q, int64_t hd) {
    q[hd] = 0;
    for (int64_t c = 0; c < hd; ++c) q[hd] += q[c];
  }

  INLINE float param(int64_t key, int which) const {
    BFloat16 x;
    std::memcpy(&x, params + key * params_stride + 2 * which, 2);
    return x;
  }

  void scores(const float* q, int64_t key, int64_t n, float* out) const {
    Plain::scores(q, key, n, out);
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] * param(key + i, 0) + q[hd] * param(key + i, 1);
  }

  void add(const float* p, int64_t key, int64_t n, float* acc) const {
    float scaled[64];
    for (int64_t i = 0; i < n; ++i) {
      scaled[i] = p[i] * param(key + i, 0);
      acc[hd] += p[i] * param(key + i, 1);
    }
    Plain::add(scaled, key, n, acc);
  }

  void finish(float* acc) const {
    for (int64_t c = 0; c < hd; ++c) acc[c] += acc[hd];
  }
};

// x = step * (code - 7.5) + centre for the channels g, g + G, ... g + 7 G of a row, G = hd / 8. Byte i of a row holds
// the codes of channels i and i + hd / 2. Its parameters are a bfloat16, the base; then 4 bits a group: which of STEPS,
// times the base, is its step, and which of the first four CENTRES, times the step, its centre; then a bit a group: of
// the last four.
struct Codes4 {
  const uint8_t *rows, *params;
  int64_t stride, params_stride, G;

  Codes4(const Store& s, int64_t b, int64_t h, int64_t hd)
      : rows(reinterpret_cast<const uint8_t*>(s.rows + b * s.batch + h * s.head)),
        params(reinterpret_cast<const uint8_t*>(s.params + b * s.params_batch + h * s.params_head)),
        stride(s.token), params_stride(s.params_token), G(hd / GROUP) {}

  static int64_t extra(int64_t hd) { return hd / GROUP; }
  static void prepare(float* q, int64_t hd) {
    const int64_t G = hd / GROUP;
    for (int64_t g = 0; g < G; ++g) {
      q[hd + g] = 0;
      for (int j = 0; j < GROUP; ++j) q[hd + g] += q[j * G + g];
    }
  }

  INLINE void group(int64_t key, int64_t g, float* step, float* centre) const {
    const uint8_t* p = params + key * params_stride;
    BFloat16 base;
    std::memcpy(&base, p, 2);
    const int choice = p[2 + g / 2] >> (g % 2 * 4) & 15, last = p[2 + G / 2 + g / 8] >> (g % 8) & 1;
    *step = static_cast<float>(base) * STEPS[choice >> 2];
    *centre = *step * CENTRES[last * 4 + (choice & 3)];
  }

  // The same for W groups from g on, a multiple of W.
  INLINE void groups(int64_t key, int64_t g, vf* step, vf* centre) const {
#if QWEN_WIDTH == 16
    const uint8_t* p = params + key * params_stride;
    BFloat16 base;
    std::memcpy(&base, p, 2);
    const __m128i packed = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 2 + g / 2)));
    const __m512i choice = _mm512_cvtepu8_epi32(_mm_or_si128(packed, _mm_slli_epi16(packed, 4)));
    uint16_t last;
    std::memcpy(&last, p + 2 + G / 2 + g / 8, 2);
    const __m512i low = _mm512_and_si512(choice, _mm512_set1_epi32(3));
    const __m512i which = _mm512_mask_or_epi32(low, last, low, _mm512_set1_epi32(4));
    const __m512 steps = _mm512_broadcast_f32x4(_mm_loadu_ps(STEPS));
    const __m512 centres = _mm512_broadcast_f32x8(_mm256_loadu_ps(CENTRES));
    *step = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(choice, 2), steps) * static_cast<float>(base);
    *centre = *step * (vf)_mm512_permutexvar_ps(which, centres);
#else
    float s[W], c[W];
    for (int i = 0; i < W; ++i) group(key, g + i, s + i, c + i);
    *step = load(s), *centre = load(c);
#endif
  }

  // The low four bits, less 7.5.
  static INLINE vf centred(vi codes) {
#if QWEN_WIDTH == 16
    static const float VALUES[] = {-7.5, -6.5, -5.5, -4.5, -3.5, -2.5, -1.5, -.5, .5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5};
    return (vf)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(VALUES));
#else
    return __builtin_convertvector(codes & 15, vf) - 7.5f;
#endif
  }

  INLINE float code(int64_t key, int j, int64_t g) const {
    return (rows[key * stride + j % 4 * G + g] >> (j / 4 * 4) & 15) - 7.5f;
  }

  void scores(const float* q, int64_t key, int64_t n, float* out) const {
    const float* whole = q + GROUP * G;
    for (int64_t i = 0; i < n; ++i) out[i] = 0;
    int64_t g = 0;
    for (; g + W <= G; g += W) {
      vf part[GROUP];
      for (int j = 0; j < GROUP; ++j) part[j] = load(q + j * G + g);
      for (int64_t i = 0; i < n; ++i) {
        vf step, centre, low{}, high{};
        __builtin_prefetch(rows + (key + i) * stride + AHEAD, 0, 2);
        groups(key + i, g, &step, &centre);
        for (int j = 0; j < GROUP / 2; ++j) {
          const vi codes = widen(rows + (key + i) * stride + j * G + g);
          low = fma(part[j], centred(codes), low);
          high = fma(part[j + GROUP / 2], centred(codes >> 4), high);
        }
        out[i] += sum(fma(step, low + high, centre * load(whole + g)));
      }
    }
    for (; g < G; ++g)
      for (int64_t i = 0; i < n; ++i) {
        float step, centre, dot = 0;
        group(key + i, g, &step, &centre);
        for (int j = 0; j < GROUP; ++j) dot += q[j * G + g] * code(key + i, j, g);
        out[i] += step * dot + centre * whole[g];
      }
  }

  void add(const float* p, int64_t key, int64_t n, float* acc) const {
    float* offsets = acc + GROUP * G;
    int64_t g = 0;
    for (; g + W <= G; g += W) {
      vf y[GROUP], offset = load(offsets + g);
      for (int j = 0; j < GROUP; ++j) y[j] = load(acc + j * G + g);
      for (int64_t i = 0; i < n; ++i) {
        vf step, centre;
        __builtin_prefetch(rows + (key + i) * stride + AHEAD, 0, 2);
        groups(key + i, g, &step, &centre);
        step *= p[i];
        offset = fma(centre, all(p[i]), offset);
        for (int j = 0; j < GROUP / 2; ++j) {
          const vi codes = widen(rows + (key + i) * stride + j * G + g);
          y[j] = fma(step, centred(codes), y[j]);
          y[j + GROUP / 2] = fma(step, centred(codes >> 4), y[j + GROUP / 2]);
        }
      }
      for (int j = 0; j < GROUP; ++j) save(acc + j * G + g, y[j]);
      save(offsets + g, offset);
    }
    for (; g < G; ++g)
      for (int64_t i = 0; i < n; ++i) {
        float step, centre;
        group(key + i, g, &step, &centre);
        for (int j = 0; j < GROUP; ++j) acc[j * G + g] += p[i] * step * code(key + i, j, g);
        offsets[g] += p[i] * centre;
      }
  }

  void finish(float* acc) const {
    for (int j = 0; j < GROUP; ++j)
      for (int64_t g = 0; g < G; ++g) acc[j * G + g] += acc[GROUP * G + g];
  }
};

// Sums of lanes H apart in the lower of the two, differences in the upper.
template <int H>
INLINE vf butterfly(vf v) {
  static const int32_t LANES[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vi lane = read<vi>(LANES);
#if defined(__clang__)
  vf other;
  for (int i = 0; i < W; ++i) other[i] = v[i ^ H];
#else
  const vf other = __builtin_shuffle(v, lane ^ H);
#endif
  return other + select((lane & H) != 0, -v, v);
}

// The orthonormal Walsh-Hadamard transform of blocks of the largest power of two that divides hd; its own inverse.
void rotate(float* x, int64_t hd) {
  const int64_t block = hd & -hd;
  int64_t h = 1;
  if (block >= W) {
    for (int64_t i = 0; i < hd; i += W) {
      vf v = butterfly<2>(butterfly<1>(load(x + i)));
#if QWEN_WIDTH >= 8
      v = butterfly<4>(v);
#endif
#if QWEN_WIDTH >= 16
      v = butterfly<8>(v);
#endif
      save(x + i, v);
    }
    h = W;
  }
  for (; h < block; h *= 2)
    for (int64_t i = 0; i < hd; i += 2 * h)
      for (int64_t j = i; j < i + h; ++j) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
  const float norm = static_cast<float>(1 / std::sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < hd; ++i) x[i] *= norm;
}

// --- attention ----------------------------------------------------------------------------------------------------

constexpr int64_t BLOCK = 64;  // keys between two looks at the largest score

template <class Keys>
void attend_heads(const Attention& a, bool rotated, int64_t begin, int64_t end) {
  const int64_t width = a.hd + Keys::extra(a.hd);
  std::vector<float> queries(a.T * width), sums(a.T * width), tops(a.T), weights(a.T);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / a.splits, split = item % a.splits, b = head / a.nh, h = head % a.nh;
    const int64_t first = a.first_key(split), last = a.first_key(split + 1);
    const Keys keys(a.k, b, h, a.hd), values(a.v, b, h, a.hd);
    for (int64_t t = 0; t < a.T; ++t) {
      float* q = queries.data() + t * width;
      const int64_t from = b * a.q_batch + h * a.q_head + t * a.q_token;
      for (int64_t c = 0; c < a.hd; ++c)
        q[c] = a.scaling * (a.q_bf16 ? static_cast<float>(static_cast<const BFloat16*>(a.q)[from + c])
                                     : static_cast<const float*>(a.q)[from + c]);
      if (rotated) rotate(q, a.hd);
      Keys::prepare(q, a.hd);
    }
    std::fill(sums.begin(), sums.end(), 0.f);
    std::fill(tops.begin(), tops.end(), MINUS_INFINITY);
    std::fill(weights.begin(), weights.end(), 0.f);

    for (int64_t key = first; key < last; key += BLOCK)
      for (int64_t t = 0; t < a.T; ++t) {
        const int64_t visible = a.causal ? std::min(last, a.S - a.T + t + 1) : last;
        const int64_t n = std::min(BLOCK, visible - key);
        if (n <= 0) continue;
        float p[BLOCK + W];
        keys.scores(queries.data() + t * width, key, n, p);
        if (a.mask) {
          const bool* mask = a.mask + b * a.mask_strides[0] + h * a.mask_strides[1] + t * a.mask_strides[2];
          for (int64_t i = 0; i < n; ++i)
            if (!mask[(key + i) * a.mask_strides[3]]) p[i] = MINUS_INFINITY;
        }
        for (int64_t i = n; i % W != 0; ++i) p[i] = MINUS_INFINITY;
        vf highest = all(tops[t]);
        for (int64_t i = 0; i < n; i += W) highest = maximum(highest, load(p + i));
        const float top = largest(highest);
        if (top == MINUS_INFINITY) continue;
        float* acc = sums.data() + t * width;
        if (top != tops[t]) {
          const float shrink = std::exp(tops[t] - top);
          for (int64_t c = 0; c < width; ++c) acc[c] *= shrink;
          weights[t] *= shrink;
          tops[t] = top;
        }
        vf total{};
        for (int64_t i = 0; i < n; i += W) {
          const vf e = exp(load(p + i) - top);
          total += e;
          save(p + i, e);
        }
        weights[t] += sum(total);
        values.add(p, key, n, acc);
      }

    for (int64_t t = 0; t < a.T; ++t) {
      float* acc = sums.data() + t * width;
      values.finish(acc);
      float* to = a.partial + (item * a.T + t) * (a.hd + 2);
      std::memcpy(to, acc, a.hd * sizeof(float));
      to[a.hd] = tops[t], to[a.hd + 1] = weights[t];
    }
  }
}

void attend(const Attention& a, Kind kind, int64_t begin, int64_t end) {
  switch (kind) {
    case F32: return attend_heads<Plain<float>>(a, false, begin, end);
    case BF16: return attend_heads<Plain<BFloat16>>(a, false, begin, end);
    case INT8: return attend_heads<Codes8>(a, true, begin, end);
    case INT4: return attend_heads<Codes4>(a, true, begin, end);
  }
}

void merge(const Attention& a, bool rotated, int64_t begin, int64_t end) {
  std::vector<float> y(a.hd);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i / a.T, t = i % a.T, b = head / a.nh, h = head % a.nh;
    auto part = [&](int64_t split) { return a.partial + ((head * a.splits + split) * a.T + t) * (a.hd + 2); };
    float top = MINUS_INFINITY, total = 0;
    for (int64_t s = 0; s < a.splits; ++s) top = std::max(top, part(s)[a.hd]);
    std::fill(y.begin(), y.end(), 0.f);
    for (int64_t s = 0; s < a.splits; ++s) {
      const float* from = part(s);
      if (from[a.hd] == MINUS_INFINITY) continue;  // no key of this part is attended to
      const float weight = std::exp(from[a.hd] - top);
      total += weight * from[a.hd + 1];
      for (int64_t c = 0; c < a.hd; ++c) y[c] += weight * from[c];
    }
    if (total > 0)
      for (int64_t c = 0; c < a.hd; ++c) y[c] /= total;
    if (rotated) rotate(y.data(), a.hd);
    const int64_t to = ((b * a.T + t) * a.nh + h) * a.hd;
    for (int64_t c = 0; c < a.hd; ++c)
      if (a.out)
        a.out[to + c] = y[c];
      else
        a.out_bf16[to + c] = y[c];
  }
}

// --- quantising ---------------------------------------------------------------------------------------------------

void extremes(const float* x, int64_t n, float* low, float* high) {
  int64_t i = 0;
  vf lows = all(x[0]), highs = lows;
  for (; i + W <= n; i += W) {
    lows = minimum(load(x + i), lows);
    highs = maximum(load(x + i), highs);
  }
  *low = -largest(-lows), *high = largest(highs);
  for (; i < n; ++i) *low = std::min(*low, x[i]), *high = std::max(*high, x[i]);
}

void encode8(const float* x, int64_t hd, uint8_t* codes, uint8_t* params) {
  float low, high;
  extremes(x, hd, &low, &high);
  const BFloat16 rounded_centre = low * .5f + high * .5f;
  const float centre = rounded_centre;
  const BFloat16 step = std::max(high - centre, centre - low) / 127.f;
  const float divisor = step > 0 ? static_cast<float>(step) : 1.f;
  std::memcpy(params, &step, 2);
  std::memcpy(params + 2, &rounded_centre, 2);
  for (int64_t c = 0; c < hd; c += W) {
    const int64_t lanes = std::min<int64_t>(W, hd - c);
    vf part{};
    std::memcpy(&part, x + c, lanes * sizeof(float));
    const vf code = minimum(maximum(round((part - centre) / divisor), all(-128.f)), all(127.f));
    for (int64_t i = 0; i < lanes; ++i) codes[c + i] = static_cast<uint8_t>(static_cast<int8_t>(code[i]));
  }
}

INLINE vf code4(vf scaled, vf zero) { return minimum(maximum(round(scaled - zero), vf{}), all(15.f)); }

// Of all steps and centres those with the smallest squared error, for W groups at a time.
void encode4(const float* x, int64_t hd, uint8_t* codes, uint8_t* params) {
  const int64_t G = hd / GROUP;
  float low, high;
  extremes(x, hd, &low, &high);
  const BFloat16 base = std::fabs(std::max(-low, high)) * (1.f / 15);
  const float divisor = base > 0 ? static_cast<float>(base) : 1.f;
  std::memset(params, 0, 2 + G / 2 + (G + 7) / 8);
  std::memcpy(params, &base, 2);
  for (int64_t g = 0; g < G; g += W) {
    const int64_t lanes = std::min<int64_t>(W, G - g);
    vf part[GROUP] = {}, best = all(std::numeric_limits<float>::infinity()), best_zero{}, best_inverse{};
    for (int j = 0; j < GROUP; ++j) {
      std::memcpy(part + j, x + j * G + g, lanes * sizeof(float));
      part[j] = part[j] / divisor;
    }
    vi choice{};
    for (int s = 0; s < 4; ++s) {
      vf scaled[GROUP];
      for (int j = 0; j < GROUP; ++j) scaled[j] = part[j] * INVERSES[s];
      for (int z = 0; z < 8; ++z) {
        const vf zero = all(CENTRES[z] - 7.5f);
        vf error[GROUP];
        for (int j = 0; j < GROUP; ++j) {
          const vf miss = ((code4(scaled[j], zero) + zero) - scaled[j]) * STEPS[s];
          error[j] = miss * miss;
        }
        for (int n = GROUP / 2; n > 0; n /= 2)
          for (int j = 0; j < n; ++j) error[j] += error[j + n];
        const vi better = error[0] < best;
        best = select(better, error[0], best);
        best_zero = select(better, zero, best_zero);
        best_inverse = select(better, all(INVERSES[s]), best_inverse);
        choice = (better & (8 * s + z)) | (~better & choice);
      }
    }
    for (int j = 0; j < GROUP; ++j) part[j] = code4(part[j] * best_inverse, best_zero);
    for (int64_t i = 0; i < lanes; ++i) {
      for (int j = 0; j < GROUP / 2; ++j)
        codes[j * G + g + i] = static_cast<int>(part[j][i]) | static_cast<int>(part[j + GROUP / 2][i]) << 4;
      params[2 + (g + i) / 2] |= (choice[i] >> 3 << 2 | (choice[i] & 3)) << ((g + i) % 2 * 4);
      params[2 + G / 2 + (g + i) / 8] |= (choice[i] >> 2 & 1) << ((g + i) % 8);
    }
  }
}

template <class T>
void append_rows(const Append& a, bool int4, int64_t begin, int64_t end) {
  std::vector<float> x(a.hd);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i % a.T, h = i / a.T % a.nh, b = i / a.T / a.nh;
    const T* from = static_cast<const T*>(a.x) + b * a.x_batch + h * a.x_head + t * a.x_token;
    for (int64_t c = 0; c < a.hd; ++c) x[c] = from[c];
    rotate(x.data(), a.hd);
    uint8_t* codes = a.codes + b * a.codes_batch + h * a.codes_head + t * a.codes_token;
    uint8_t* params = a.params + b * a.params_batch + h * a.params_head + t * a.params_token;
    int4 ? encode4(x.data(), a.hd, codes, params) : encode8(x.data(), a.hd, codes, params);
  }
}

void append(const Append& a, bool bf16, bool int4, int64_t begin, int64_t end) {
  bf16 ? append_rows<BFloat16>(a, int4, begin, end) : append_rows<float>(a, int4, begin, end);
}

// --- norm, rotary embedding and what is done number by number -------------------------------------------------------

template <class T>
void norm_rows(const Norm& a, int64_t begin, int64_t end) {
  const T* w = static_cast<const T*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.n;
    T* y = static_cast<T*>(a.y) + row * a.n;
    float squares;
    dots<1, 1>(x, 0, x, 0, 0, a.n, &squares);
    const float factor = 1 / std::sqrt(squares / a.n + a.eps);
    int64_t i = 0;
    for (; i + W <= a.n; i += W) {
      T normed[W];  // rounded to the dtype of x before the weight, as the model defines it
      save(normed, load(x + i) * factor);
      save(y + i, load(normed) * load(w + i));
    }
    for (; i < a.n; ++i) y[i] = static_cast<float>(static_cast<T>(x[i] * factor)) * static_cast<float>(w[i]);
  }
}

void norm(const Norm& a, bool bf16, int64_t begin, int64_t end) {
  bf16 ? norm_rows<BFloat16>(a, begin, end) : norm_rows<float>(a, begin, end);
}

template <class T>
void rotary_rows(const Rotary& a, int64_t begin, int64_t end) {
  const int64_t half = a.half;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i % a.T, h = i / a.T % a.nh, b = i / a.T / a.nh;
    const T* x = static_cast<const T*>(a.x) + b * a.x_batch + h * a.x_head + t * a.x_token;
    T* y = static_cast<T*>(a.y) + i * a.hd;
    const float* cos = a.cos + b * a.angles_batch + t * half;
    const float* sin = a.sin + b * a.angles_batch + t * half;
    int64_t c = 0;
    for (; c + W <= half; c += W) {
      const vf one = load(x + c), other = load(x + half + c);
      save(y + c, one * load(cos + c) - other * load(sin + c));
      save(y + half + c, other * load(cos + c) + one * load(sin + c));
    }
    for (; c < half; ++c) {
      const float one = x[c], other = x[half + c];
      y[c] = one * cos[c] - other * sin[c];
      y[half + c] = other * cos[c] + one * sin[c];
    }
    for (c = 2 * half; c < a.hd; ++c) y[c] = x[c];
  }
}

void rotary(const Rotary& a, bool bf16, int64_t begin, int64_t end) {
  bf16 ? rotary_rows<BFloat16>(a, begin, end) : rotary_rows<float>(a, begin, end);
}

// y = f(x, y) for n numbers; those that fill no vector are computed in one, too.
template <class T, class F>
INLINE void each(const T* x, int64_t n, T* y, const F& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) save(y + i, f(load(x + i), load(y + i)));
  if (i == n) return;
  T last_x[W] = {}, last_y[W] = {};
  std::copy(x + i, x + n, last_x), std::copy(y + i, y + n, last_y);
  save(last_y, f(load(last_x), load(last_y)));
  std::copy(last_y, last_y + n - i, y + i);
}

template <class T>
void add_numbers(const void* x, int64_t n, void* y) {
  const auto sum = [](vf a, vf b) __attribute__((always_inline)) { return b + a; };
  each(static_cast<const T*>(x), n, static_cast<T*>(y), sum);
}

void add(const void* x, bool bf16, int64_t n, void* y) {
  bf16 ? add_numbers<BFloat16>(x, n, y) : add_numbers<float>(x, n, y);
}

template <class T>
void gate_numbers(const void* x, int64_t n, void* y) {
  const auto product = [](vf a, vf b) __attribute__((always_inline)) {
    const vf e = exp(select(a > 0.f, -a, a));
    T silu[W];  // rounded, as an operation of its own is
    save(silu, a * select(a > 0.f, all(1.f), e) / (1.f + e));
    return b * load(silu);
  };
  each(static_cast<const T*>(x), n, static_cast<T*>(y), product);
}

void gate(const void* x, bool bf16, int64_t n, void* y) {
  bf16 ? gate_numbers<BFloat16>(x, n, y) : gate_numbers<float>(x, n, y);
}

extern const Kernels KERNELS;
constexpr Kernels KERNELS{linear, whole_steps, gptq, fixed_point, gptq_by_output, widen, dequantize,
                          attend, merge, append, norm, rotary, add, gate};

#endif
#endif
#undef INLINE

}  // namespace QWEN_LEVEL

#endif
