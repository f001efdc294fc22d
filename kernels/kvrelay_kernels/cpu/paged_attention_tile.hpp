// The inner loops of paged attention, over a tile of keys and a few query rows.
//
// What a number depends on is fixed here. A score is one chain of multiply-adds over ascending
// dimensions, an output one chain over ascending keys; how many rows or vectors share a loop changes
// neither.
#pragma once

#include "native.hpp"

namespace kvr {

#if defined(__AVX512F__)
constexpr int kScoreRows = 12;    // query rows of a loop over scores: 24 accumulators of 32 registers
constexpr int kValueRows = 6;     // query rows of a loop over values
constexpr int kValueVectors = 4;  // and sixteens of the head: 24 accumulators
constexpr int score_vectors(int rows) { return rows <= 6 ? 4 : 2; }
#else
constexpr int kScoreRows = 6;     // 12 accumulators of 16 registers, or 24 of 32 on Arm
constexpr int kValueRows = 6;
constexpr int kValueVectors = 1;
constexpr int score_vectors(int) { return 1; }
#endif
constexpr int kPanelsAtOnce = 4;  // the most vectors of a loop over scores
constexpr int64_t kStepKeys = kPanelsAtOnce * kLanes;

// Keys and values of a head: the row of key k lies offsets[k] bytes after `base`.
struct Rows {
  const char* base;
  const int64_t* offsets;

  template <class T>
  const T* row(int64_t key) const {
    return reinterpret_cast<const T*>(base + offsets[key]);
  }
  void prefetch(int64_t key, int64_t byte) const { __builtin_prefetch(base + offsets[key] + byte); }
};

// ---- keys, transposed: a panel holds sixteen keys as [head_dim][16] floats

#if defined(__AVX512F__)
// row[i] lane j becomes row[j] lane i.
static inline void transpose(__m512i (&row)[16]) {
  __m512i pair[16], quad[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      quad[i + 2 * j] = _mm512_unpacklo_epi64(pair[i + j], pair[i + j + 2]);
      quad[i + 2 * j + 1] = _mm512_unpackhi_epi64(pair[i + j], pair[i + j + 2]);
    }
  // quad[4 * g + c] holds column 4 * lane + c of rows 4 * g to 4 * g + 3, for its four lanes of 128 bits.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512i low01 = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0x44);
    __m512i high01 = _mm512_shuffle_i32x4(quad[c], quad[4 + c], 0xee);
    __m512i low23 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0x44);
    __m512i high23 = _mm512_shuffle_i32x4(quad[8 + c], quad[12 + c], 0xee);
    row[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    row[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    row[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    row[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

template <class T>
static inline void pack_panel(const Rows& keys, int64_t first, int64_t head_dim, float* panel) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    __m512i row[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = (__m512i)load_f32(keys.row<T>(first + i) + d);
    transpose(row);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(panel + (d + i) * kLanes, row[i]);
  }
}

// Two neighbouring dimensions are moved as one number and parted afterwards.
static inline void store_pair(float* to, __m512i both) {
  store(to, _mm512_slli_epi32(both, 16));
  store(to + kLanes, _mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000u))));
}

template <>
inline void pack_panel<bfloat16>(const Rows& keys, int64_t first, int64_t head_dim, float* panel) {
  __m512i row[16];
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_dim; d += 2 * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) row[i] = load<__m512i>(keys.row<bfloat16>(first + i) + d);
    transpose(row);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store_pair(panel + (d + 2 * i) * kLanes, row[i]);
  }
  if (d == head_dim) return;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = _mm512_zextsi256_si512(load<__m256i>(keys.row<bfloat16>(first + i) + d));
  transpose(row);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) store_pair(panel + (d + 2 * i) * kLanes, row[i]);
}
#else
typedef float f32x4 __attribute__((vector_size(16)));

template <class T>
static inline void pack_panel(const Rows& keys, int64_t first, int64_t head_dim, float* panel) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    alignas(64) float rows[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) store_f32(rows[i], load_f32(keys.row<T>(first + i) + d));
    for (int i = 0; i < kLanes; i += 4)
      for (int j = 0; j < kLanes; j += 4) {
        f32x4 a = load<f32x4>(&rows[i][j]), b = load<f32x4>(&rows[i + 1][j]);
        f32x4 c = load<f32x4>(&rows[i + 2][j]), e = load<f32x4>(&rows[i + 3][j]);
        f32x4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        f32x4 ce_low = __builtin_shufflevector(c, e, 0, 4, 1, 5), ce_high = __builtin_shufflevector(c, e, 2, 6, 3, 7);
        float* to = panel + (d + j) * kLanes + i;
        store(to, __builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5));
        store(to + kLanes, __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7));
        store(to + 2 * kLanes, __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5));
        store(to + 3 * kLanes, __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7));
      }
  }
}
#endif

// ---- scores of R rows and V panels: queries are packed [head_dim][R], scores lie `stride` apart
//
// Between two multiplications a loop asks for a little of what comes `ahead`, the next kStepKeys rows. All at
// once they would wait for each other, and the multiplications for them.

template <int R, int V>
static inline void score(const float* queries, const float* panels, int64_t head_dim, float* scores, int64_t stride,
                         const Rows& ahead) {
  constexpr int N = V * kParts;
  native_f32 acc[R][N] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    if constexpr (V == score_vectors(1)) {
      ahead.prefetch(d % kStepKeys, d / kStepKeys * 128);
      ahead.prefetch(d % kStepKeys, d / kStepKeys * 128 + 64);
    }
    native_f32 keys[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      keys[n] = load_native(panels + (n / kParts * head_dim + d) * kLanes + n % kParts * kNative);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      native_f32 query = broadcast(queries[d * R + r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = multiply_add(query, keys[n], acc[r][n]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(scores + r * stride + n * kNative, acc[r][n]);
}

template <int R = kScoreRows>
static inline void score_rows(int rows, const float* queries, const float* panels, int64_t count, int64_t head_dim,
                              float* scores, int64_t stride, const Rows& ahead) {
  if constexpr (R > 1) {
    if (rows < R) return score_rows<R - 1>(rows, queries, panels, count, head_dim, scores, stride, ahead);
  }
  constexpr int V = score_vectors(R);
  int64_t p = 0;
  for (; p + V <= count; p += V)
    score<R, V>(queries, panels + p * head_dim * kLanes, head_dim, scores + p * kLanes, stride, ahead);
  if constexpr (V > 1) {
    for (; p < count; ++p)
      score<R, 1>(queries, panels + p * head_dim * kLanes, head_dim, scores + p * kLanes, stride, ahead);
  }
}

// ---- outputs of R rows: acc[r][d] += sum over keys of weights[r][key] * value[key][d], V vectors of d

template <int R, int V, class T>
static inline void weigh(const float* weights, int64_t stride, const Rows& values, const Rows& ahead, int64_t first,
                         int64_t begin, int64_t end, float* out, int64_t out_stride) {
  constexpr int N = V * kParts;
  native_f32 acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[r][n] = load_native(out + r * out_stride + n * kNative);
  for (int64_t key = begin; key < end; ++key) {
#pragma GCC unroll 4
    for (int byte = 0; byte < V * kLanes * int(sizeof(T)); byte += 64)
      ahead.prefetch(key + kStepKeys, first * int64_t(sizeof(T)) + byte);
    const T* row = values.row<T>(key) + first;
    native_f32 value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) value[n] = load_native(row + n * kNative);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      native_f32 weight = broadcast(weights[r * stride + key]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = multiply_add(weight, value[n], acc[r][n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(out + r * out_stride + n * kNative, acc[r][n]);
}

template <class T, int R, int V = kValueVectors>
static inline void weigh_vectors(int64_t vectors, const float* weights, int64_t stride, const Rows& values,
                                 const Rows& ahead, int64_t first, int64_t begin, int64_t end, float* out,
                                 int64_t out_stride) {
  if constexpr (V > 1) {
    if (vectors < V)
      return weigh_vectors<T, R, V - 1>(vectors, weights, stride, values, ahead, first, begin, end, out, out_stride);
  }
  weigh<R, V, T>(weights, stride, values, ahead, first, begin, end, out, out_stride);
}

template <class T, int R = kValueRows>
static inline void weigh_rows(int rows, int64_t head_dim, const float* weights, int64_t stride, const Rows& values,
                              const Rows& ahead, int64_t begin, int64_t end, float* out, int64_t out_stride) {
  if constexpr (R > 1) {
    if (rows < R)
      return weigh_rows<T, R - 1>(rows, head_dim, weights, stride, values, ahead, begin, end, out, out_stride);
  }
  int64_t vectors = head_dim / kLanes, parts = (vectors + kValueVectors - 1) / kValueVectors;
  for (int64_t part = 0; part < parts; ++part) {
    int64_t from = part * vectors / parts, count = (part + 1) * vectors / parts - from;
    weigh_vectors<T, R>(count, weights, stride, values, ahead, from * kLanes, begin, end, out + from * kLanes,
                        out_stride);
  }
}

}  // namespace kvr
