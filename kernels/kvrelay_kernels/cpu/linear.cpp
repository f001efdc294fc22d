// out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] over weights packed once at load.
//
// Packed layout: tiles of 32 outputs (the last one padded with zeros), each tile contiguous in the order
// it is read, so that one row of activations streams the whole matrix at memory speed:
//
//   float32, float16   tile[k][32]
//   bfloat16, int8     tile[k / 2][32][2]     two neighbouring inputs together, as dot instructions want
//
// Every out[m, n] is one chain of additions in ascending k, whatever the number of rows, threads or the
// blocking: a row's result is the same bits in every batch. (int8: integers within blocks of 512 inputs,
// exact in any order; the blocks in ascending order.)
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "ops.hpp"
#include "threads.hpp"
#include "vector.hpp"

namespace kvr {

struct linear_args {
  Count rows;
  const float* x;       // [rows, width], stride x_stride
  int64_t x_stride;
  const void* weight;   // packed
  int64_t format;       // Format of the packed weight
  const float* scale;   // [outputs], int8 only
  const float* bias;    // [outputs] or null
  float* out;           // [rows, outputs], stride out_stride
  int64_t out_stride;
  int64_t outputs;
  int64_t width;        // even
};

struct pack_linear_args {
  int64_t parts;
  const void* const* part_data;   // each [part_rows, width], contiguous
  const int64_t* part_rows;
  int64_t source_format;          // Format of the parts: float32, bfloat16 or float16
  int64_t format;                 // Format to pack into
  void* packed;
  float* scale;                   // [outputs], int8 only
  int64_t outputs;
  int64_t width;
};

namespace {

constexpr int64_t kTile = 2 * kLanes;    // outputs of a tile
constexpr int64_t kQuantBlock = 512;     // inputs that share an activation scale: 512 * 32767 * 127 < 2^31
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
  using Sum = f32x16;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kVector = kLanes;  // where the second vector of a tile starts
  template <int M, int V>
  static inline void step(const float* const* a, int64_t k, const T* const (&vectors)[V], Sum (&acc)[M][V]) {
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
#if defined(__AVX512BF16__)
  using Activation = bfloat16;
#else
  using Activation = float;
#endif
  using Stored = bfloat16;
  using Sum = f32x16;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kVector = 2 * kLanes;
  template <int M, int V>
  static inline void step(const Activation* const* a, int64_t k, const bfloat16* const (&vectors)[V], Sum (&acc)[M][V]) {
    // Lane i holds inputs k (low half) and k + 1 (high half) of output i.
    u32x16 both[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) both[v] = load<u32x16>(vectors[v] + k * kTile);
#if defined(__AVX512BF16__)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(a[m] + k));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = (f32x16)_mm512_dpbf16_ps((__m512)acc[m][v], pair, (__m512bh)both[v]);
    }
#else
    f32x16 even[V], odd[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      even[v] = (f32x16)(both[v] << 16);
      odd[v] = (f32x16)(both[v] & 0xffff0000u);
    }
    multiply_pair<M, V>(a, k, even, odd, acc);
#endif
  }
};

struct I8 {
  // Sixteen bits hold an activation better than bfloat16 would: weight-only quantisation in effect.
  using Activation = int16_t;
  using Stored = int8_t;
  using Sum = i32x16;
  static constexpr int64_t kBlock = kQuantBlock;
  static constexpr int64_t kVector = 2 * kLanes;
  template <int M, int V>
  static inline void step(const int16_t* const* a, int64_t k, const int8_t* const (&vectors)[V], Sum (&acc)[M][V]) {
#if defined(__AVX512BW__)
    __m512i wide[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) wide[v] = _mm512_cvtepi8_epi16(load<__m256i>(vectors[v] + k * kTile));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      __m512i pair = _mm512_set1_epi32(load<int32_t>(a[m] + k));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
#if defined(__AVX512VNNI__)
        acc[m][v] = (i32x16)_mm512_dpwssd_epi32((__m512i)acc[m][v], wide[v], pair);
#else
        acc[m][v] += (i32x16)_mm512_madd_epi16(wide[v], pair);
#endif
    }
#else
    for (int v = 0; v < V; ++v) {
      i32x16 even, odd;
      for (int i = 0; i < kLanes; ++i) {
        even[i] = vectors[v][k * kTile + 2 * i];
        odd[i] = vectors[v][k * kTile + 2 * i + 1];
      }
      for (int m = 0; m < M; ++m) acc[m][v] += even * int32_t(a[m][k]) + odd * int32_t(a[m][k + 1]);
    }
#endif
  }
};

// ---- the product of M rows and T tiles over inputs [begin, end)

template <class W>
struct Job {
  const linear_args* args;
  int64_t rows;
  const typename W::Activation* x;   // converted activations, or the caller's own
  int64_t x_stride;
  const float* x_scale;              // [rows, blocks], int8 only
  int64_t blocks;
};

// Where the 16 outputs of vector v start, and how many of them exist.
inline int64_t lanes_left(const linear_args& args, int64_t tile, int v) {
  return args.outputs - tile * kTile - v * kLanes;
}

inline f32x16 load_some(const float* from, int64_t count) {
  if (count >= kLanes) return load_f32(from);
  f32x16 value{};
  for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  return value;
}

inline void store_some(float* to, f32x16 value, int64_t count) {
  if (count >= kLanes) return store_f32(to, value);
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

template <class W, int M, int T>
void multiply(const Job<W>& job, int64_t row, int64_t tile, int64_t begin, int64_t end) {
  constexpr int V = 2 * T;
  constexpr bool quantised = std::is_same<W, I8>::value;
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

  if constexpr (quantised) {
    for (int64_t block = begin; block < end; block += kQuantBlock) {
      i32x16 acc[M][V] = {};
      int64_t stop = block + kQuantBlock < end ? block + kQuantBlock : end;
      for (int64_t k = block; k < stop; k += 2) W::template step<M, V>(a, k, vectors, acc);
      for (int m = 0; m < M; ++m) {
        f32x16 scale = splat(job.x_scale[(row + m) * job.blocks + block / kQuantBlock]);
        for (int v = 0; v < V; ++v)
          sum[m][v] = fma(__builtin_convertvector(acc[m][v], f32x16), scale, sum[m][v]);
      }
    }
  } else {
    for (int64_t k = begin; k < end; k += 2) W::template step<M, V>(a, k, vectors, sum);
  }

  bool last = end == args.width;
  for (int v = 0; v < V; ++v) {
    int64_t left = lanes_left(args, tile + v / 2, v % 2);
    if (left <= 0) continue;
    int64_t n = tile * kTile + v * kLanes;
    f32x16 scale = last && quantised ? load_some(args.scale + n, left) : splat(1.0f);
    f32x16 bias = last && args.bias ? load_some(args.bias + n, left) : f32x16{};
    for (int m = 0; m < M; ++m) {
      f32x16 value = sum[m][v];
      if (last && quantised) value = value * scale;
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

void quantise_row(const float* x, int64_t width, int16_t* to, float* scales) {
  for (int64_t block = 0, i = 0; block < width; block += kQuantBlock, ++i) {
    int64_t size = block + kQuantBlock < width ? kQuantBlock : width - block;
    float most = 0;
    for (int64_t k = 0; k < size; ++k) {
      float magnitude = std::fabs(x[block + k]);
      most = magnitude > most ? magnitude : most;
    }
    // Not finite: the scale carries it into every sum, where the engine looks for it.
    bool finite = true;
    for (int64_t k = 0; k < size; ++k) finite &= std::fabs(x[block + k]) <= 3.4028234e38f;
    float inverse = most > 0 && finite ? 32767.0f / most : 0.0f;
    for (int64_t k = 0; k < size; ++k) to[block + k] = int16_t(std::nearbyintf(finite ? x[block + k] * inverse : 0.0f));
    scales[i] = finite ? most / 32767.0f : std::numeric_limits<float>::quiet_NaN();
  }
}

void run_int8(const linear_args& args, int64_t rows) {
  int64_t blocks = (args.width + kQuantBlock - 1) / kQuantBlock;
  int16_t* x = scratch<int16_t>(rows * args.width);
  float* scales = scratch<float>(rows * blocks);
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      quantise_row(args.x + row * args.x_stride, args.width, x + row * args.width, scales + row * blocks);
  });
  multiply_all(Job<I8>{&args, rows, x, args.width, scales, blocks});
}

#if defined(__AVX512BF16__)
void run_bfloat16(const linear_args& args, int64_t rows) {
  bfloat16* x = scratch<bfloat16>(rows * args.width);
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* from = args.x + row * args.x_stride;
      bfloat16* to = x + row * args.width;
      int64_t k = 0;
      for (; k + kLanes <= args.width; k += kLanes) store_f32(to + k, load_f32(from + k));
      for (; k < args.width; ++k) store_one(to + k, from[k]);
    }
  });
  multiply_all(Job<BF16>{&args, rows, x, args.width, nullptr, 0});
}
#else
void run_bfloat16(const linear_args& args, int64_t rows) {
  multiply_all(Job<BF16>{&args, rows, args.x, args.x_stride, nullptr, 0});
}
#endif

// ---- packing

// The 32 source rows of one tile; null past the last output.
struct TileRows {
  const char* row[kTile];
};

TileRows tile_rows(const pack_linear_args& args, int64_t tile, int64_t row_bytes) {
  TileRows rows{};
  int64_t part = 0, before = 0;
  for (int64_t i = 0; i < kTile; ++i) {
    int64_t n = tile * kTile + i;
    if (n >= args.outputs) break;
    while (n - before >= args.part_rows[part]) before += args.part_rows[part++];
    rows.row[i] = static_cast<const char*>(args.part_data[part]) + (n - before) * row_bytes;
  }
  return rows;
}

// Inputs [start, start + count) of 32 rows, turned into the order of a tile. `Group` is what stays together:
// two neighbouring inputs in the paired formats, one in the others.
constexpr int64_t kChunk = 32;

template <class Group, class To>
void turn(const To (&rows)[kTile][kChunk], int64_t start, int64_t count, To* packed) {
  constexpr int64_t size = sizeof(Group) / sizeof(To);
  Group* to = reinterpret_cast<Group*>(packed + start * kTile);
  for (int64_t g = 0; g < count / size; ++g)
    for (int64_t i = 0; i < kTile; ++i) to[g * kTile + i] = load<Group>(&rows[i][g * size]);
}

template <class From>
inline void copy_row(const From* from, int64_t count, From* to) {
  std::memcpy(to, from, count * sizeof(From));
}

template <class From, class To>
inline void copy_row(const From* from, int64_t count, To* to) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_f32(to + k, load_f32(from + k));
  for (; k < count; ++k) store_one(to + k, to_float(from[k]));
}

template <class From, class To, class Group>
void pack_tile(const pack_linear_args& args, int64_t tile) {
  TileRows source = tile_rows(args, tile, args.width * int64_t(sizeof(From)));
  To* packed = static_cast<To*>(args.packed) + tile * kTile * args.width;
  To rows[kTile][kChunk] = {};
  for (int64_t start = 0; start < args.width; start += kChunk) {
    int64_t count = std::min(kChunk, args.width - start);
    for (int64_t i = 0; i < kTile; ++i)
      if (source.row[i]) copy_row(reinterpret_cast<const From*>(source.row[i]) + start, count, rows[i]);
    turn<Group>(rows, start, count, packed);
  }
}

template <class From>
float largest(const From* row, int64_t width) {
  f32x16 most{};
  int64_t k = 0;
  for (; k + kLanes <= width; k += kLanes) most = max(most, (f32x16)((u32x16)load_f32(row + k) & 0x7fffffffu));
  float value = maximum(most);
  for (; k < width; ++k) value = std::max(value, std::fabs(to_float(row[k])));
  return value;
}

template <class From>
void pack_tile_int8(const pack_linear_args& args, int64_t tile) {
  TileRows source = tile_rows(args, tile, args.width * int64_t(sizeof(From)));
  int8_t* packed = static_cast<int8_t*>(args.packed) + tile * kTile * args.width;
  float inverse[kTile] = {};
  for (int64_t i = 0; i < kTile; ++i) {
    if (!source.row[i]) continue;
    float most = largest(reinterpret_cast<const From*>(source.row[i]), args.width);
    args.scale[tile * kTile + i] = most / 127.0f;
    inverse[i] = most > 0 ? 127.0f / most : 0.0f;
  }
  int8_t rows[kTile][kChunk] = {};
  float wide[kChunk];
  for (int64_t start = 0; start < args.width; start += kChunk) {
    int64_t count = std::min(kChunk, args.width - start);
    for (int64_t i = 0; i < kTile; ++i) {
      if (!source.row[i]) continue;
      copy_row(reinterpret_cast<const From*>(source.row[i]) + start, count, wide);
      for (int64_t k = 0; k < count; ++k) rows[i][k] = int8_t(std::nearbyintf(wide[k] * inverse[i]));
    }
    turn<uint16_t>(rows, start, count, packed);
  }
}

template <class From>
void pack_from(const pack_linear_args& args) {
  int64_t tiles = (args.outputs + kTile - 1) / kTile;
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) switch (args.format) {
        case kFloat32: pack_tile<From, float, float>(args, tile); break;
        case kFloat16: pack_tile<From, float16, uint16_t>(args, tile); break;
        case kBFloat16: pack_tile<From, bfloat16, uint32_t>(args, tile); break;
        default: pack_tile_int8<From>(args, tile);
      }
  });
}

}  // namespace
}  // namespace kvr

KVR_OP(linear) {
  int64_t rows = args->rows.get();
  if (rows <= 0) return;
  switch (args->format) {
    case kvr::kFloat32: return kvr::multiply_all(kvr::Job<kvr::F32>{args, rows, args->x, args->x_stride, nullptr, 0});
    case kvr::kFloat16: return kvr::multiply_all(kvr::Job<kvr::F16>{args, rows, args->x, args->x_stride, nullptr, 0});
    case kvr::kBFloat16: return kvr::run_bfloat16(*args, rows);
    default: return kvr::run_int8(*args, rows);
  }
}

KVR_OP(pack_linear) {
  switch (args->source_format) {
    case kvr::kFloat32: return kvr::pack_from<float>(*args);
    case kvr::kBFloat16: return kvr::pack_from<kvr::bfloat16>(*args);
    default: return kvr::pack_from<kvr::float16>(*args);
  }
}
