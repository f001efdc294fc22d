// out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] over weights packed once at load (linear.hpp).
//
// Every out[m, n] is one chain of additions in ascending k, whatever the number of rows, threads or the
// blocking: a row's result is the same bits in every batch. (Integer formats: exact sums within a block
// of inputs, the blocks in ascending order.)
#include <cmath>
#include <limits>
#include <vector>

#include "linear.hpp"
#include "threads.hpp"

namespace kvr {

struct linear_args {
  Count rows;
  const float* x;       // [rows, width], stride x_stride
  int64_t x_stride;
  const void* weight;   // packed
  int64_t format;       // Format of the packed weight
  const float* scale;   // int8: [outputs]; int16: [tiles, blocks, 32]; else null
  const float* bias;    // [outputs] or null
  float* out;           // [rows, outputs], stride out_stride
  int64_t out_stride;
  int64_t outputs;
  int64_t width;        // even
};

namespace {

constexpr int64_t kSuperRows = 96;       // rows of a block of large products; its slice stays in L2
constexpr int64_t kTilesPerTask = 8;

#if defined(__AVX512F__)
constexpr int kMaxRows = 12;             // 24 accumulators of 32 registers
#elif defined(__aarch64__)
constexpr int kMaxRows = 3;              // 24 of 32 quarter-width registers
#else
constexpr int kMaxRows = 3;              // 12 of 16 half-width registers
#endif

// How many tiles one pass over few rows takes: enough independent chains to hide the latency of an add.
constexpr int tiles_at_once(int rows) { return rows <= 2 ? 4 : rows <= 6 ? 2 : 1; }

// ---- one policy per storage format: what activations become, and how two inputs of every vector are
// multiplied. The weights of both inputs are held while the rows pass by: one broadcast at a time keeps
// the accumulators in registers.

template <int M, int V>
inline void multiply_pair(const float* const* a, int64_t k, const f32x16 (&even)[V], const f32x16 (&odd)[V],
                          f32x16 (&acc)[M][V]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    f32x16 first = splat(a[m][k]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = fma(first, even[v], acc[m][v]);
    f32x16 second = splat(a[m][k + 1]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = fma(second, odd[v], acc[m][v]);
  }
}

template <class T>
struct Plain {
  using Activation = float;
  using Stored = T;
  using Blocks = void;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kVector = kLanes;  // where the second vector of a tile starts
  template <int M, int V>
  static inline void step(const float* const* a, int64_t k, const T* const (&vectors)[V], f32x16 (&acc)[M][V]) {
    f32x16 even[V], odd[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      even[v] = load_f32(vectors[v] + k * kTile);
      odd[v] = load_f32(vectors[v] + (k + 1) * kTile);
    }
    multiply_pair<M, V>(a, k, even, odd, acc);
  }
};

using F32 = Plain<float>;
using F16 = Plain<float16>;

struct BF16 {
  using Activation = float;
  using Stored = bfloat16;
  using Blocks = void;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kVector = 2 * kLanes;
  template <int M, int V>
  static inline void step(const float* const* a, int64_t k, const bfloat16* const (&vectors)[V], f32x16 (&acc)[M][V]) {
    // Lane i holds inputs k (low half) and k + 1 (high half) of output i.
    f32x16 even[V], odd[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      u32x16 both = load<u32x16>(vectors[v] + k * kTile);
      even[v] = (f32x16)(both << 16);
      odd[v] = (f32x16)(both & 0xffff0000u);
    }
    multiply_pair<M, V>(a, k, even, odd, acc);
  }
};

// Sixteen bits with a scale for each block of inputs hold an activation better than bfloat16 would.
template <class T, class Scales>
struct Integers {
  using Activation = int16_t;
  using Stored = T;
  using Blocks = Scales;
  static constexpr int64_t kBlock = 512 / sizeof(T);  // of a tile and a block of rows, both stay in L1
  static constexpr int64_t kVector = 2 * kLanes;
  template <int M, int V>
  static inline void step(const int16_t* const* a, int64_t k, const T* const (&vectors)[V], i32x16 (&acc)[M][V]) {
    pairs16 wide[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) wide[v] = load_pairs(vectors[v] + k * kTile);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      pairs16 pair = splat_pair(a[m] + k);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = dot_pairs(wide[v], pair, acc[m][v]);
    }
  }
};

using I8 = Integers<int8_t, Int8Blocks>;
using I16 = Integers<int16_t, Int16Blocks>;

template <class W>
constexpr bool kIntegers = !std::is_void<typename W::Blocks>::value;
template <class W>
constexpr bool kScaledBlocks = std::is_same<W, I16>::value;   // a weight scale a block
template <class W>
constexpr bool kScaledOutputs = std::is_same<W, I8>::value;   // a weight scale an output

// ---- the product of M rows and T tiles over inputs [begin, end)

template <class W>
struct Job {
  const linear_args* args;
  int64_t rows;
  const typename W::Activation* x;   // converted activations, or the caller's own
  int64_t x_stride;
  const float* x_scale;              // [rows, blocks], integer formats only
  int64_t blocks;
};

// Where the 16 outputs of vector v start, and how many of them exist.
inline int64_t lanes_left(const linear_args& args, int64_t tile, int v) {
  return args.outputs - tile * kTile - v * kLanes;
}

// The sums of M rows over inputs [begin, end), exact within each block of them.
template <class W, int M, int V>
inline void add_blocks(const Job<W>& job, int64_t row, int64_t tile, int64_t begin, int64_t end,
                       const typename W::Activation* const* a, const typename W::Stored* const (&vectors)[V],
                       f32x16 (&sum)[M][V]) {
  constexpr int64_t kInputs = W::Blocks::kInputs;
  for (int64_t start = begin; start < end; start += kInputs) {
    i32x16 acc[M][V] = {};
    int64_t stop = start + kInputs < end ? start + kInputs : end;
    for (int64_t k = start; k < stop; k += 2) W::template step<M, V>(a, k, vectors, acc);
    int64_t block = start / kInputs;
    f32x16 weight_scale[V];
    if constexpr (kScaledBlocks<W>)
      for (int v = 0; v < V; ++v)
        weight_scale[v] = load_f32(job.args->scale + ((tile + v / 2) * job.blocks + block) * kTile + v % 2 * kLanes);
    for (int m = 0; m < M; ++m) {
      f32x16 scale = splat(job.x_scale[(row + m) * job.blocks + block]);
      for (int v = 0; v < V; ++v) {
        f32x16 value = __builtin_convertvector(acc[m][v], f32x16);
        if constexpr (kScaledBlocks<W>) value = value * weight_scale[v];
        sum[m][v] = fma(value, scale, sum[m][v]);
      }
    }
  }
}

template <class W, int M, int T>
void multiply(const Job<W>& job, int64_t row, int64_t tile, int64_t begin, int64_t end) {
  constexpr int V = 2 * T;
  const linear_args& args = *job.args;
  const typename W::Activation* a[M];
  for (int m = 0; m < M; ++m) a[m] = job.x + (row + m) * job.x_stride;
  const auto* packed = static_cast<const typename W::Stored*>(args.weight);
  const typename W::Stored* vectors[V];
  for (int v = 0; v < V; ++v) vectors[v] = packed + (tile + v / 2) * kTile * args.width + v % 2 * W::kVector;

  f32x16 sum[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) {
      int64_t left = lanes_left(args, tile + v / 2, v % 2);
      sum[m][v] = begin == 0 || left <= 0
                      ? f32x16{}
                      : load_some(args.out + (row + m) * args.out_stride + tile * kTile + v * kLanes, left);
    }

  if constexpr (kIntegers<W>) {
    add_blocks<W, M, V>(job, row, tile, begin, end, a, vectors, sum);
  } else {
    for (int64_t k = begin; k < end; k += 2) W::template step<M, V>(a, k, vectors, sum);
  }

  bool last = end == args.width;
  for (int v = 0; v < V; ++v) {
    int64_t left = lanes_left(args, tile + v / 2, v % 2);
    if (left <= 0) continue;
    int64_t n = tile * kTile + v * kLanes;
    f32x16 scale = last && kScaledOutputs<W> ? load_some(args.scale + n, left) : splat(1.0f);
    f32x16 bias = last && args.bias ? load_some(args.bias + n, left) : f32x16{};
    for (int m = 0; m < M; ++m) {
      f32x16 value = sum[m][v];
      if (last && kScaledOutputs<W>) value = value * scale;
      if (last && args.bias) value = value + bias;
      store_some(args.out + (row + m) * args.out_stride + n, value, left);
    }
  }
}

template <class W, int M = kMaxRows>
void multiply_rows(const Job<W>& job, int rows, int64_t row, int64_t tile, int64_t tiles, int64_t begin, int64_t end) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<W, M - 1>(job, rows, row, tile, tiles, begin, end);
  }
  constexpr int T = tiles_at_once(M);
  int64_t t = 0;
  for (; t + T <= tiles; t += T) multiply<W, M, T>(job, row, tile + t, begin, end);
  for (; t < tiles; ++t) multiply<W, M, 1>(job, row, tile + t, begin, end);
}

// Rows are split evenly: a remainder of one row would leave the multipliers waiting for its only chain.
struct RowBlocks {
  int64_t first, rows, count;
  RowBlocks(int64_t first, int64_t rows) : first(first), rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {}
  int64_t begin(int64_t block) const { return first + block * rows / count; }
};

template <class W>
void multiply_few(const Job<W>& job) {
  int64_t tiles = (job.args->outputs + kTile - 1) / kTile;
  RowBlocks blocks(0, job.rows);
  parallel_for(tiles, 4, [&](int64_t begin, int64_t end) {
    // A tile is read from memory for the first block of rows and from the cache for the others.
    int64_t group = blocks.count == 1 ? end - begin : 1;
    for (int64_t tile = begin; tile < end; tile += group)
      for (int64_t b = 0; b < blocks.count; ++b) {
        int64_t row = blocks.begin(b);
        multiply_rows<W>(job, int(blocks.begin(b + 1) - row), row, tile, group, 0, job.args->width);
      }
  });
}

template <class W>
void multiply_many(const Job<W>& job) {
  int64_t tiles = (job.args->outputs + kTile - 1) / kTile;
  int64_t tasks_n = (tiles + kTilesPerTask - 1) / kTilesPerTask;
  int64_t supers = (job.rows + kSuperRows - 1) / kSuperRows;
  int64_t width = job.args->width;
  parallel_for(tasks_n * supers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t first_row = task / tasks_n * job.rows / supers;
      RowBlocks blocks(first_row, (task / tasks_n + 1) * job.rows / supers - first_row);
      int64_t first = task % tasks_n * kTilesPerTask;
      int64_t last = first + kTilesPerTask < tiles ? first + kTilesPerTask : tiles;
      for (int64_t k = 0; k < width; k += W::kBlock) {
        int64_t stop = k + W::kBlock < width ? k + W::kBlock : width;
        for (int64_t tile = first; tile < last; ++tile)
          for (int64_t b = 0; b < blocks.count; ++b) {
            int64_t row = blocks.begin(b);
            multiply_rows<W>(job, int(blocks.begin(b + 1) - row), row, tile, 1, k, stop);
          }
      }
    }
  });
}

template <class W>
void multiply_all(const Job<W>& job) {
  job.rows <= 4 * kMaxRows ? multiply_few(job) : multiply_many(job);
}

// ---- activations in the form the weights want; the buffers grow to the largest step and stay

template <class T>
T* scratch(int64_t size) {
  static thread_local std::vector<T> buffer;
  if (int64_t(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

template <class Blocks>
void quantise_row(const float* x, int64_t width, int16_t* to, float* scales) {
  for (int64_t start = 0; start < width; start += Blocks::kInputs, ++scales) {
    int64_t count = start + Blocks::kInputs < width ? Blocks::kInputs : width - start;
    float most = largest(x + start, count);
    if (most <= std::numeric_limits<float>::max()) {
      round_products(x + start, most > 0 ? Blocks::kMostActivation / most : 0.0f, count, to + start);
      *scales = most / Blocks::kMostActivation;
    } else {
      // Not finite: the scale carries it into every sum, where the engine looks for it.
      std::memset(to + start, 0, count * sizeof *to);
      *scales = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

template <class W>
void run_floats(const linear_args& args, int64_t rows) {
  multiply_all(Job<W>{&args, rows, args.x, args.x_stride, nullptr, 0});
}

template <class W>
void run_integers(const linear_args& args, int64_t rows) {
  using Blocks = typename W::Blocks;
  int64_t blocks = (args.width + Blocks::kInputs - 1) / Blocks::kInputs;
  int16_t* x = scratch<int16_t>(rows * args.width);
  float* scales = scratch<float>(rows * blocks);
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      quantise_row<Blocks>(args.x + row * args.x_stride, args.width, x + row * args.width, scales + row * blocks);
  });
  multiply_all(Job<W>{&args, rows, x, args.width, scales, blocks});
}

}  // namespace
}  // namespace kvr

KVR_OP(linear) {
  int64_t rows = args->rows.get();
  if (rows <= 0) return;
  switch (args->format) {
    case kvr::kFloat32: return kvr::run_floats<kvr::F32>(*args, rows);
    case kvr::kFloat16: return kvr::run_floats<kvr::F16>(*args, rows);
    case kvr::kBFloat16: return kvr::run_floats<kvr::BF16>(*args, rows);
    case kvr::kInt16: return kvr::run_integers<kvr::I16>(*args, rows);
    default: return kvr::run_integers<kvr::I8>(*args, rows);
  }
}

// Whether bfloat16 weights are faster as int16 here: a dot product of 16-bit integers is one instruction
// of twice the width of a float's. (CPUs that also multiply bfloat16 do that at this rate at best.)
extern "C" int64_t kvr_prefers_int16() {
#if defined(__AVX512VNNI__)
  return 1;
#else
  return 0;
#endif
}
