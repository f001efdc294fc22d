// One register of floats, for innermost loops: of wider vectors the compiler keeps what it holds across
// iterations in memory.
#pragma once

#include "vector.hpp"

namespace kvr {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kParts = kLanes / kNative;

typedef float native_f32 __attribute__((vector_size(4 * kNative)));
typedef uint32_t native_u32 __attribute__((vector_size(4 * kNative)));
typedef int32_t native_i32 __attribute__((vector_size(4 * kNative)));
typedef uint16_t native_u16 __attribute__((vector_size(2 * kNative)));
typedef int16_t native_pairs __attribute__((vector_size(4 * kNative)));  // two neighbouring inputs a lane
typedef int8_t narrow_pairs __attribute__((vector_size(2 * kNative)));

static inline native_f32 broadcast(float value) { return value - native_f32{}; }

static inline native_f32 load_native(const float* from) { return load<native_f32>(from); }

// a * b + c with one rounding, where the CPU can.
#if defined(__AVX512F__)
static inline native_f32 load_native(const bfloat16* from) { return load_f32(from); }
static inline native_f32 load_native(const float16* from) { return load_f32(from); }
static inline native_f32 multiply_add(native_f32 a, native_f32 b, native_f32 c) { return fma(a, b, c); }
#else
static inline native_f32 load_native(const bfloat16* from) {
  return (native_f32)(__builtin_convertvector(load<native_u16>(from), native_u32) << 16);
}
static inline native_f32 load_native(const float16* from) {
#if defined(__F16C__)
  return (native_f32)_mm256_cvtph_ps(load<__m128i>(from));
#else
  native_f32 value;
  for (int i = 0; i < kNative; ++i) value[i] = to_float(from[i]);
  return value;
#endif
}
static inline native_f32 multiply_add(native_f32 a, native_f32 b, native_f32 c) {
#if defined(__FMA__)
  return (native_f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
#endif

// ---- dot products of pairs of 16-bit integers

static inline native_pairs load_pairs(const int16_t* from) { return load<native_pairs>(from); }
static inline native_pairs load_pairs(const int8_t* from) {
#if defined(__AVX512BW__)
  return (native_pairs)_mm512_cvtepi8_epi16(load<__m256i>(from));
#else
  return __builtin_convertvector(load<narrow_pairs>(from), native_pairs);
#endif
}
static inline native_pairs broadcast_pair(const int16_t* from) {
  return (native_pairs)(load<int32_t>(from) - native_i32{});
}

// sum + a[0] * b[0] + a[1] * b[1] in each lane
static inline native_i32 dot_pairs(native_pairs a, native_pairs b, native_i32 sum) {
#if defined(__AVX512VNNI__)
  return (native_i32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (native_i32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (native_i32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  native_i32 first = ((native_i32)a << 16 >> 16) * ((native_i32)b << 16 >> 16);
  return sum + first + ((native_i32)a >> 16) * ((native_i32)b >> 16);
#endif
}

}  // namespace kvr
