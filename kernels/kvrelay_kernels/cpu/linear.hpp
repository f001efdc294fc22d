// How projections are packed: shared by pack_linear.cpp, which writes it, and linear.cpp, which reads it.
//
// Tiles of 32 outputs (the last one padded with zeros), each tile contiguous in the order it is read, so
// that one row of activations streams the whole matrix at memory speed:
//
//   float32, float16         tile[k][32]
//   bfloat16, int8, int16    tile[k / 2][32][2]     two neighbouring inputs together, as dot instructions want
//
// int8 has one scale an output. int16 is bfloat16 as a CPU with 16-bit dot products wants it: integers
// with a scale for each 64 inputs of an output, scale[tile][k / 64][32].
#pragma once

#include <cmath>

#include "ops.hpp"
#include "vector.hpp"

namespace kvr {

constexpr int64_t kTile = 2 * kLanes;  // outputs of a tile

// Inputs that share a scale, and the largest integers: a block's sum of products must fit 32 bits.
struct Int8Blocks {
  static constexpr int64_t kInputs = 512;
  static constexpr int kMostActivation = 32767;
  static constexpr int kMostWeight = 127;
};
struct Int16Blocks {
  static constexpr int64_t kInputs = 64;
  static constexpr int kMostActivation = 5792;
  static constexpr int kMostWeight = 5792;
};

template <class Blocks>
constexpr bool fits_32_bits() {
  return Blocks::kInputs * Blocks::kMostActivation * Blocks::kMostWeight < int64_t(1) << 31;
}
static_assert(fits_32_bits<Int8Blocks>() && fits_32_bits<Int16Blocks>(), "a block overflows its sum");

// The largest magnitude among `count` numbers, at least 0; infinite or NaN if one of them is.
template <class From>
static inline float largest(const From* x, int64_t count) {
  u32x16 most{};  // magnitudes compare as integers, and what is not finite is above all that is
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    u32x16 magnitude = (u32x16)load_f32(x + k) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  uint32_t value = maximum(most);
  for (; k < count; ++k) {
    float one = to_float(x[k]);
    uint32_t magnitude;
    std::memcpy(&magnitude, &one, sizeof magnitude);
    magnitude &= 0x7fffffffu;
    value = magnitude > value ? magnitude : value;
  }
  float result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// to[k] = round(x[k] * factor), halves to even
template <class From, class To>
static inline void round_products(const From* x, float factor, int64_t count, To* to) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_rounded(to + k, load_f32(x + k) * factor);
  for (; k < count; ++k) to[k] = To(std::nearbyintf(to_float(x[k]) * factor));
}

}  // namespace kvr
