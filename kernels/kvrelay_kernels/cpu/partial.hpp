// Rows whose length is no multiple of the lanes: loads and stores of the first few lanes.
#pragma once

#include "native.hpp"

namespace kvr {

// Zeros in the lanes past `count`.
static inline f32x16 load_first(const float* from, int64_t count) {
  if (count >= kLanes) return load_f32(from);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load_f32(lanes);
}

template <class T>
static inline void store_first(T* to, f32x16 value, int64_t count) {
  if (count >= kLanes) return store_f32(to, value);
  T lanes[kLanes];
  store_f32(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// Sum of squares in an order that depends on the length alone: 64 chains, so that the additions of one
// row overlap.
static inline float sum_of_squares(const float* x, int64_t width) {
  constexpr int kChains = 4 * kParts;
  native_f32 chain[kChains] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) {
      native_f32 value = load_native(x + i + c * kNative);
      chain[c] = multiply_add(value, value, chain[c]);
    }
  if (i < width) {
    float rest[4 * kLanes] = {};
    std::memcpy(rest, x + i, (width - i) * sizeof(float));
    for (int c = 0; c < kChains; ++c) {
      native_f32 value = load_native(rest + c * kNative);
      chain[c] = multiply_add(value, value, chain[c]);
    }
  }
  f32x16 sums[4];
  std::memcpy(sums, chain, sizeof sums);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows a thread takes at a time, so that waking it pays: a few microseconds of work.
static inline int64_t rows_per_task(int64_t numbers_per_row) {
  constexpr int64_t kNumbersPerTask = 16384;
  return numbers_per_row < kNumbersPerTask ? kNumbersPerTask / (numbers_per_row + 1) + 1 : 1;
}

}  // namespace kvr
