// The most likely token of each row, the lowest id among equals: one pass, each lane with its own best.
#include <limits>

#include "ops.hpp"
#include "threads.hpp"
#include "vector.hpp"

namespace kvr {

struct greedy_args {
  Count rows;
  int64_t vocabulary;   // below 2^31
  const float* logits;  // [rows, vocabulary], stride
  int64_t stride;
  int64_t* tokens;      // [rows]
};

namespace {

int64_t most_likely(const float* logits, int64_t vocabulary) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  f32x16 best = splat(0.0f) + kLowest;
  i32x16 at{}, here{};
  for (int i = 0; i < kLanes; ++i) at[i] = here[i] = i;
  int64_t v = 0;
  for (; v + kLanes <= vocabulary; v += kLanes, here += kLanes) {
    f32x16 value = load_f32(logits + v);
    i32x16 better = value > best;
    best = better ? value : best;
    at = better ? here : at;
  }
  float most = kLowest;
  int64_t token = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (best[i] > most || (best[i] == most && at[i] < token)) most = best[i], token = at[i];
  }
  for (; v < vocabulary; ++v) {
    if (logits[v] > most) most = logits[v], token = v;
  }
  return token;
}

}  // namespace
}  // namespace kvr

KVR_OP(greedy) {
  kvr::parallel_for(args->rows.get(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      args->tokens[row] = kvr::most_likely(args->logits + row * args->stride, args->vocabulary);
  });
}
