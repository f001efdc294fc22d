// Sixteen lanes at a time. The compiler's vector extension lowers them to whatever the CPU has;
// intrinsics appear only where an instruction has no portable spelling.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvr {

constexpr int kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class Vector>
static inline Vector load(const void* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class Vector>
static inline void store(void* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

static inline f32x16 splat(float value) { return value - f32x16{}; }

// One rounding, in every build of every kernel: results must not depend on what the optimiser fuses.
static inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

static inline f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }

// A fixed tree, so that a sum over lanes is the same wherever it is taken.
static inline float sum(f32x16 v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof lane);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

static inline float maximum(f32x16 v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof lane);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

static inline uint32_t maximum(u32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32((__m512i)v);
#else
  uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// ---- storage formats: how a number of a tensor becomes float32 and back

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
static inline float to_float(float16 x) {
  _Float16 value;
  std::memcpy(&value, &x, sizeof value);
  return float(value);
}

static inline f32x16 load_f32(const float* from) { return load<f32x16>(from); }
static inline f32x16 load_f32(const bfloat16* from) {
#if defined(__AVX512F__)
  // The compiler would widen in two halves.
  return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#else
  return (f32x16)(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
#endif
}
static inline f32x16 load_f32(const float16* from) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps((__m256i)load<u16x16>(from));
#else
  f32x16 value;
  for (int i = 0; i < kLanes; ++i) value[i] = to_float(from[i]);
  return value;
#endif
}

static inline void store_f32(float* to, f32x16 value) { store(to, value); }
static inline void store_f32(bfloat16* to, f32x16 value) {
  // Round to nearest even; a NaN keeps its top bits and must not round up to infinity.
  u32x16 bits = (u32x16)value;
  u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  u32x16 quiet = (bits >> 16) | 0x40;
  u32x16 chosen = (u32x16)(value == value) ? rounded : quiet;
  store(to, __builtin_convertvector(chosen, u16x16));
}
static inline void store_f32(float16* to, f32x16 value) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kLanes; ++i) {
    _Float16 half = (_Float16)value[i];
    std::memcpy(to + i, &half, sizeof half);
  }
#endif
}

// Rounded to nearest, halves to even; within the range of To.
static inline void store_rounded(int16_t* to, f32x16 value) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)value)));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = int16_t(std::nearbyintf(value[i]));
#endif
}
static inline void store_rounded(int8_t* to, f32x16 value) {
#if defined(__AVX512F__)
  store(to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)value)));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = int8_t(std::nearbyintf(value[i]));
#endif
}

static inline void store_one(float* to, float value) { *to = value; }
static inline void store_one(bfloat16* to, float value) {
  bfloat16 lanes[kLanes];
  store_f32(lanes, splat(value));
  *to = lanes[0];
}
static inline void store_one(float16* to, float value) {
  _Float16 half = (_Float16)value;
  std::memcpy(to, &half, sizeof half);
}

}  // namespace kvr
