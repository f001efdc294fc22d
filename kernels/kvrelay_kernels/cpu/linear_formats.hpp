// What a storage format of packed weights is to the product: what activations become, and how two
// inputs of some vectors of outputs are multiplied. A vector is one register of outputs.
#pragma once

#include <type_traits>

#include "linear.hpp"
#include "native.hpp"

namespace kvr {

constexpr int kTileVectors = kTile / kNative;

// acc[m][v] += a[m][k] * weights[v]. The weights are held while the rows pass by: one broadcast at a
// time keeps the accumulators in registers.
template <int M, int V>
static inline void multiply_input(const float* const* a, int64_t k, const native_f32 (&weights)[V],
                                  native_f32 (&acc)[M][V]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    native_f32 activation = broadcast(a[m][k]);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = multiply_add(activation, weights[v], acc[m][v]);
  }
}

template <class T>
struct Plain {
  using Activation = float;
  using Stored = T;
  using Sum = native_f32;
  using Blocks = void;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kVector = kNative;  // elements of a vector of outputs
  template <int M, int V>
  static inline void step(const float* const* a, int64_t k, const T* const (&vectors)[V], Sum (&acc)[M][V]) {
    native_f32 weights[V];
    for (int64_t input = k; input < k + 2; ++input) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) weights[v] = load_native(vectors[v] + input * kTile);
      multiply_input<M, V>(a, input, weights, acc);
    }
  }
};

using F32 = Plain<float>;
using F16 = Plain<float16>;

struct BF16 {
  using Activation = float;
  using Stored = bfloat16;
  using Sum = native_f32;
  using Blocks = void;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kVector = 2 * kNative;
  template <int M, int V>
  static inline void step(const float* const* a, int64_t k, const bfloat16* const (&vectors)[V], Sum (&acc)[M][V]) {
    // A lane holds inputs k (low half) and k + 1 (high half) of an output.
    native_f32 weights[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) weights[v] = (native_f32)(load<native_u32>(vectors[v] + k * kTile) << 16);
    multiply_input<M, V>(a, k, weights, acc);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) weights[v] = (native_f32)(load<native_u32>(vectors[v] + k * kTile) & 0xffff0000u);
    multiply_input<M, V>(a, k + 1, weights, acc);
  }
};

// Sixteen bits with a scale for each block of inputs hold an activation better than bfloat16 would.
template <class T, class Scales>
struct Integers {
  using Activation = int16_t;
  using Stored = T;
  using Sum = native_i32;
  using Blocks = Scales;
  static constexpr int64_t kBlock = 512 / sizeof(T);  // of a tile and a block of rows, both stay in L1
  static constexpr int64_t kVector = 2 * kNative;
  template <int M, int V>
  static inline void step(const int16_t* const* a, int64_t k, const T* const (&vectors)[V], Sum (&acc)[M][V]) {
    native_pairs weights[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) weights[v] = load_pairs(vectors[v] + k * kTile);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      native_pairs activation = broadcast_pair(a[m] + k);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = dot_pairs(weights[v], activation, acc[m][v]);
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

}  // namespace kvr
