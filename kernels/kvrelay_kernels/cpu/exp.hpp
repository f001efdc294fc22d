// The exponential functions of the kernels: the same few operations on every CPU, in a fixed order.
#pragma once

#include "vector.hpp"

namespace kvr {

// 1.5 * 2^23: adding it rounds to an integer in the low bits. 127 more makes that a biased exponent.
constexpr float kRoundToExponent = 12582912.0f + 127.0f;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f;  // few digits, so that an integer times it is exact
constexpr float kLn2Low = -2.12194440e-4f;

// 2^r for |r| <= 1/2, exactly 1 at 0: the minimax polynomial of degree 6 for the relative error, which
// is 1.6e-8 with the coefficients rounded to float32.
static inline f32x16 exp2_fraction(f32x16 r) {
  f32x16 p = splat(1.53533634e-4f);
  p = fma(p, r, splat(1.33988750e-3f));
  p = fma(p, r, splat(9.61843692e-3f));
  p = fma(p, r, splat(5.55033237e-2f));
  p = fma(p, r, splat(0.240226477f));
  p = fma(p, r, splat(0.693147182f));
  return fma(p, r, splat(1.0f));
}

// 2^x for x <= 127, within 1.5 units in the last place: exactly 1 at 0, exactly 0 below -126 (and at
// -infinity), NaN for NaN.
static inline f32x16 exp2(f32x16 x) {
  f32x16 shifted = x + kRoundToExponent;
  f32x16 power = (f32x16)((u32x16)shifted << 23);
  f32x16 value = exp2_fraction(x - (shifted - kRoundToExponent)) * power;
  return x < -126.0f ? f32x16{} : value;
}

// e^x for x <= 88, within 2 units in the last place: 0 below -87.3, NaN for NaN.
static inline f32x16 exp(f32x16 x) {
  f32x16 shifted = fma(x, splat(kLog2E), splat(kRoundToExponent));
  f32x16 power = (f32x16)((u32x16)shifted << 23);
  f32x16 n = shifted - kRoundToExponent;
  f32x16 r = fma(n, splat(-kLn2Low), fma(n, splat(-kLn2High), x));
  f32x16 value = exp2_fraction(r * kLog2E) * power;
  return x < -87.3f ? f32x16{} : value;
}

// tanh(x) with an absolute error below 2e-7, NaN for NaN.
static inline f32x16 tanh(f32x16 x) {
  f32x16 clamped = x > 20.0f ? splat(20.0f) : x;
  f32x16 e = exp(clamped + clamped);
  return (e - 1.0f) / (e + 1.0f);
}

}  // namespace kvr
