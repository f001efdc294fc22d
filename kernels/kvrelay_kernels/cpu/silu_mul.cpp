// out = gate / (1 + e^-gate) * up.
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

inline f32x16 silu(f32x16 x) {
  // Below -88 the result is 0 to within 1e-36; NaN passes.
  f32x16 negated = x < -88.0f ? splat(88.0f) : -x;
  return x / (exp(negated) + 1.0f);
}

}  // namespace
}  // namespace kvr

KVR_OP(silu_mul) {
  using namespace kvr;
  int64_t width = args->width;
  parallel_for(args->rows.get(), rows_per_task(4 * width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = args->gate_up + row * args->gate_up_stride;
      const float* up = gate + width;
      float* out = args->out + row * args->out_stride;
      for (int64_t i = 0; i < width; i += kLanes) {
        int64_t left = width - i;
        store_first(out + i, silu(load_first(gate + i, left)) * load_first(up + i, left), left);
      }
    }
  });
}
