// One pass over each token: query and key heads are normalised (where the model does) and rotated, the
// queries in place, the keys and the values into their slot of the pool.
#include <cmath>

#include "ops.hpp"
#include "partial.hpp"
#include "threads.hpp"

namespace kvr {

struct rotary_kv_write_args {
  Count tokens;
  float* qkv;                // [tokens, heads + 2 * kv_heads, head_dim], rows qkv_stride apart
  int64_t qkv_stride;
  void* key_cache;           // [slots, kv_heads, head_dim]
  void* value_cache;
  int64_t format;            // Format of the caches
  const int64_t* slots;      // [tokens]
  const float* cos;          // [tokens, angles], rows angle_stride apart
  const float* sin;
  int64_t angle_stride;
  const float* query_norm;   // [head_dim] or null
  const float* key_norm;
  double eps;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t angles;
};

namespace {

// A head as it is read: scaled and weighted if it is normalised.
struct Head {
  const float* x;
  const float* weight;
  f32x16 inverse;

  Head(const float* x, const float* weight, int64_t width, float eps) : x(x), weight(weight), inverse(splat(1.0f)) {
    if (weight) inverse = splat(1.0f / std::sqrt(sum_of_squares(x, width) / float(width) + eps));
  }

  f32x16 load(int64_t i, int64_t count) const {
    f32x16 value = load_first(x + i, count);
    return weight ? value * inverse * load_first(weight + i, count) : value;
  }
};

struct Angles {
  const float* cos;
  const float* sin;
  int64_t count;
};

// `to` may be the head itself.
template <class T>
void rotate(const Head& head, const Angles& angles, int64_t width, T* to) {
  for (int64_t i = 0; i < angles.count; i += kLanes) {
    int64_t left = angles.count - i;
    f32x16 c = load_first(angles.cos + i, left), s = load_first(angles.sin + i, left);
    f32x16 first = head.load(i, left), second = head.load(angles.count + i, left);
    store_first(to + i, fma(first, c, -(second * s)), left);
    store_first(to + angles.count + i, fma(second, c, first * s), left);
  }
  for (int64_t i = 2 * angles.count; i < width; i += kLanes)
    store_first(to + i, head.load(i, width - i), width - i);
}

template <class T>
void write_token(const rotary_kv_write_args& args, int64_t token) {
  int64_t width = args.head_dim;
  Angles angles{args.cos + token * args.angle_stride, args.sin + token * args.angle_stride, args.angles};
  float* row = args.qkv + token * args.qkv_stride;
  for (int64_t h = 0; h < args.heads; ++h) {
    float* query = row + h * width;
    rotate(Head(query, args.query_norm, width, float(args.eps)), angles, width, query);
  }
  int64_t place = args.slots[token] * args.kv_heads * width;
  T* keys = static_cast<T*>(args.key_cache) + place;
  T* values = static_cast<T*>(args.value_cache) + place;
  const float* key = row + args.heads * width;
  for (int64_t h = 0; h < args.kv_heads; ++h)
    rotate(Head(key + h * width, args.key_norm, width, float(args.eps)), angles, width, keys + h * width);
  const float* value = key + args.kv_heads * width;
  int64_t count = args.kv_heads * width;
  for (int64_t i = 0; i < count; i += kLanes)
    store_first(values + i, load_first(value + i, count - i), count - i);
}

template <class T>
void write_tokens(const rotary_kv_write_args& args) {
  int64_t grain = rows_per_task((args.heads + 2 * args.kv_heads) * args.head_dim);
  parallel_for(args.tokens.get(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) write_token<T>(args, token);
  });
}

}  // namespace
}  // namespace kvr

KVR_OP(rotary_kv_write) {
  using namespace kvr;
  if (args->format == kFloat32) write_tokens<float>(*args);
  if (args->format == kBFloat16) write_tokens<bfloat16>(*args);
  if (args->format == kFloat16) write_tokens<float16>(*args);
}
