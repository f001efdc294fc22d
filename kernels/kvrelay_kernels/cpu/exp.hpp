// The exponential functions of the kernels: the same few operations on every CPU, in a fixed order.
#pragma once

#include "native.hpp"

namespace kvr {

// 1.5 * 2^23: adding it rounds to an integer in the low bits. 127 more makes that a biased exponent.
constexpr float kRoundToExponent = 12582912.0f + 127.0f;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2High = 0.693359375f;  // few digits, so that an integer times it is exact
constexpr float kLn2Low = -2.12194440e-4f;

// 2^r for |r| <= 1/2, exactly 1 at 0: the minimax polynomial of degree 6 for the relative error, which
// is 1.6e-8 with the coefficients rounded to float32.
static inline native_f32 exp2_fraction(native_f32 r) {
  native_f32 p = broadcast(1.53533634e-4f);
  p = multiply_add(p, r, broadcast(1.33988750e-3f));
  p = multiply_add(p, r, broadcast(9.61843692e-3f));
  p = multiply_add(p, r, broadcast(5.55033237e-2f));
  p = multiply_add(p, r, broadcast(0.240226477f));
  p = multiply_add(p, r, broadcast(0.693147182f));
  return multiply_add(p, r, broadcast(1.0f));
}

// 2^x for x <= 127, within 1.5 units in the last place: exactly 1 at 0, exactly 0 below -126 (and at
// -infinity), NaN for NaN.
static inline native_f32 exp2(native_f32 x) {
  native_f32 shifted = x + kRoundToExponent;
  native_f32 power = (native_f32)((native_u32)shifted << 23);
  native_f32 value = exp2_fraction(x - (shifted - kRoundToExponent)) * power;
  return x < -126.0f ? native_f32{} : value;
}

// e^x for x <= 88, within 2 units in the last place: 0 below -87.3, NaN for NaN.
static inline native_f32 exp(native_f32 x) {
  native_f32 shifted = multiply_add(x, broadcast(kLog2E), broadcast(kRoundToExponent));
  native_f32 power = (native_f32)((native_u32)shifted << 23);
  native_f32 n = shifted - kRoundToExponent;
  native_f32 r = multiply_add(n, broadcast(-kLn2Low), multiply_add(n, broadcast(-kLn2High), x));
  native_f32 value = exp2_fraction(r * kLog2E) * power;
  return x < -87.3f ? native_f32{} : value;
}

// tanh(x) with an absolute error below 2e-7, NaN for NaN.
static inline native_f32 tanh(native_f32 x) {
  native_f32 clamped = x > 20.0f ? broadcast(20.0f) : x;
  native_f32 e = exp(clamped + clamped);
  return (e - 1.0f) / (e + 1.0f);
}

}  // namespace kvr
