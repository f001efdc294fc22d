// out = gate / (1 + e^-gate) * up.
#include <algorithm>

#include "exp.hpp"
#include "ops.hpp"
#include "partial.hpp"
#include "threads.hpp"

namespace kvr {

struct silu_mul_args {
  Count rows;
  const float* gate_up;   // [rows, 2 * width], stride gate_up_stride
  int64_t gate_up_stride;
  float* out;             // [rows, width], stride out_stride
  int64_t out_stride;
  int64_t width;
};

namespace {

inline native_f32 gated(native_f32 gate, native_f32 up) {
  // Below -88 the result is 0 to within 1e-36; NaN passes.
  native_f32 x = gate < -88.0f ? broadcast(-88.0f) : gate;
  return x / (exp(-x) + 1.0f) * up;
}

void silu_mul_row(const float* gate, const float* up, int64_t width, float* out) {
  int64_t i = 0;
  for (; i + kNative <= width; i += kNative) store(out + i, gated(load_native(gate + i), load_native(up + i)));
  if (i == width) return;
  float lanes[2][kNative] = {};
  std::copy(gate + i, gate + width, lanes[0]);
  std::copy(up + i, up + width, lanes[1]);
  store(lanes[0], gated(load_native(lanes[0]), load_native(lanes[1])));
  std::copy(lanes[0], lanes[0] + (width - i), out + i);
}

}  // namespace
}  // namespace kvr

KVR_OP(silu_mul) {
  using namespace kvr;
  int64_t width = args->width;
  parallel_for(args->rows.get(), rows_per_task(4 * width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = args->gate_up + row * args->gate_up_stride;
      silu_mul_row(gate, gate + width, width, args->out + row * args->out_stride);
    }
  });
}
