// out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] over weights packed once at load (linear.hpp).
//
// Every out[m, n] is one chain of additions in ascending k, whatever the number of rows, threads or the
// blocking: a row's result is the same bits in every batch. (Integer formats: exact sums within a block
// of inputs, the blocks in ascending order.)
#include <limits>
#include <vector>

#include "linear_formats.hpp"
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

// Rows and vectors of one pass: their product is what the registers hold besides the weights, and for
// few rows enough independent chains to hide the latency of an add.
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
constexpr int vectors_at_once(int rows) { return rows <= 2 ? 8 : rows <= 6 ? 4 : 2; }
#elif defined(__aarch64__)
constexpr int kMaxRows = 6;
constexpr int vectors_at_once(int rows) { return rows <= 2 ? 8 : 4; }
#else
constexpr int kMaxRows = 6;
constexpr int vectors_at_once(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#endif

// ---- the product of M rows and V vectors over inputs [begin, end)

template <class W>
struct Job {
  const linear_args* args;
  int64_t rows;
  const typename W::Activation* x;   // converted activations, or the caller's own
  int64_t x_stride;
  const float* x_scale;              // [rows, blocks], integer formats only
  int64_t blocks;
};

inline native_f32 load_some(const float* from, int64_t count) {
  if (count >= kNative) return load_native(from);
  native_f32 value{};
  for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  return value;
}

inline void store_some(float* to, native_f32 value, int64_t count) {
  if (count >= kNative) return store(to, value);
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

// The sums of M rows over inputs [begin, end), exact within each block of them.
template <class W, int M, int V>
inline void add_blocks(const Job<W>& job, int64_t row, int64_t vector, int64_t begin, int64_t end,
                       const typename W::Activation* const* a, const typename W::Stored* const (&vectors)[V],
                       native_f32 (&sum)[M][V]) {
  constexpr int64_t kInputs = W::Blocks::kInputs;
  for (int64_t start = begin; start < end; start += kInputs) {
    native_i32 acc[M][V] = {};
    int64_t stop = start + kInputs < end ? start + kInputs : end;
    for (int64_t k = start; k < stop; k += 2) W::template step<M, V>(a, k, vectors, acc);
    int64_t block = start / kInputs;
    native_f32 weight_scale[V];
    if constexpr (kScaledBlocks<W>)
      for (int v = 0; v < V; ++v) {
        int64_t tile = (vector + v) / kTileVectors, lane = (vector + v) % kTileVectors * kNative;
        weight_scale[v] = load_native(job.args->scale + (tile * job.blocks + block) * kTile + lane);
      }
    for (int m = 0; m < M; ++m) {
      native_f32 scale = broadcast(job.x_scale[(row + m) * job.blocks + block]);
      for (int v = 0; v < V; ++v) {
        native_f32 value = __builtin_convertvector(acc[m][v], native_f32);
        if constexpr (kScaledBlocks<W>) value = value * weight_scale[v];
        sum[m][v] = multiply_add(value, scale, sum[m][v]);
      }
    }
  }
}

template <class W, int M, int V>
void multiply(const Job<W>& job, int64_t row, int64_t vector, int64_t begin, int64_t end) {
  const linear_args& args = *job.args;
  const typename W::Activation* a[M];
  for (int m = 0; m < M; ++m) a[m] = job.x + (row + m) * job.x_stride;
  const auto* packed = static_cast<const typename W::Stored*>(args.weight);
  const typename W::Stored* vectors[V];
  int64_t left[V];  // outputs that exist from the start of a vector on
  for (int v = 0; v < V; ++v) {
    int64_t tile = (vector + v) / kTileVectors, lane = (vector + v) % kTileVectors;
    vectors[v] = packed + tile * kTile * args.width + lane * W::kVector;
    left[v] = args.outputs - (vector + v) * kNative;
  }
  float* out = args.out + row * args.out_stride + vector * kNative;

  native_f32 sum[M][V];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v)
      sum[m][v] = begin == 0 || left[v] <= 0 ? native_f32{}
                                             : load_some(out + m * args.out_stride + v * kNative, left[v]);

  if constexpr (kIntegers<W>) {
    add_blocks<W, M, V>(job, row, vector, begin, end, a, vectors, sum);
  } else {
    for (int64_t k = begin; k < end; k += 2) W::template step<M, V>(a, k, vectors, sum);
  }

  bool last = end == args.width;
  for (int v = 0; v < V; ++v) {
    if (left[v] <= 0) continue;
    int64_t n = (vector + v) * kNative;
    native_f32 scale = last && kScaledOutputs<W> ? load_some(args.scale + n, left[v]) : broadcast(1.0f);
    native_f32 bias = last && args.bias ? load_some(args.bias + n, left[v]) : native_f32{};
    for (int m = 0; m < M; ++m) {
      native_f32 value = sum[m][v];
      if (last && kScaledOutputs<W>) value = value * scale;
      if (last && args.bias) value = value + bias;
      store_some(out + m * args.out_stride + v * kNative, value, left[v]);
    }
  }
}

template <class W, int M = kMaxRows>
void multiply_rows(const Job<W>& job, int rows, int64_t row, int64_t tile, int64_t tiles, int64_t begin, int64_t end) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_rows<W, M - 1>(job, rows, row, tile, tiles, begin, end);
  }
  constexpr int V = vectors_at_once(M);
  constexpr int kFew = V < kTileVectors ? V : kTileVectors;
  int64_t vector = tile * kTileVectors, stop = (tile + tiles) * kTileVectors;
  for (; vector + V <= stop; vector += V) multiply<W, M, V>(job, row, vector, begin, end);
  for (; vector < stop; vector += kFew) multiply<W, M, kFew>(job, row, vector, begin, end);
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
