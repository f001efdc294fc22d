// out = x / sqrt(mean(x^2) + eps) * weight, after residual += x where there is a residual (which is then
// what is normalised). One read of each input: the second pass over a row finds it in the cache.
#include <cmath>

#include "ops.hpp"
#include "partial.hpp"
#include "threads.hpp"

namespace kvr {

struct rms_norm_args {
  Count rows;
  const float* x;         // [rows, width], stride x_stride
  int64_t x_stride;
  float* residual;        // [rows, width], stride residual_stride; or null
  int64_t residual_stride;
  const float* weight;    // [width]
  float* out;             // [rows, width], stride out_stride; may be x
  int64_t out_stride;
  int64_t width;
  double eps;
};

namespace {

void add(float* to, const float* x, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    int64_t left = width - i;
    store_first(to + i, load_first(to + i, left) + load_first(x + i, left), left);
  }
}

void normalise(const float* x, const float* weight, int64_t width, float eps, float* out) {
  f32x16 inverse = splat(1.0f / std::sqrt(sum_of_squares(x, width) / float(width) + eps));
  for (int64_t i = 0; i < width; i += kLanes) {
    int64_t left = width - i;
    store_first(out + i, load_first(x + i, left) * inverse * load_first(weight + i, left), left);
  }
}

}  // namespace
}  // namespace kvr

KVR_OP(rms_norm) {
  using namespace kvr;
  parallel_for(args->rows.get(), rows_per_task(args->width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = args->x + row * args->x_stride;
      if (args->residual) {
        float* residual = args->residual + row * args->residual_stride;
        add(residual, x, args->width);
        x = residual;
      }
      normalise(x, args->weight, args->width, float(args->eps), args->out + row * args->out_stride);
    }
  });
}
