// A draw of one token a row: integer weights, their filters and the inverse of their running sum, as
// kvrelay_kernels/sampling.py defines them. The weights must equal those of reference/sampling.py bit by
// bit, so no multiplication here may be fused with the addition behind it.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "ops.hpp"
#include "threads.hpp"

namespace kvr {

struct sample_args {
  Count rows;
  int64_t vocabulary;
  const float* logits;
  int64_t stride;
  const double* temperature;
  const int64_t* top_k;
  const double* top_p;
  const double* min_p;
  const double* uniform;
  int64_t* tokens;
};

struct integer_weights_args {
  Count rows;
  int64_t vocabulary;
  const float* logits;
  int64_t stride;
  const double* temperature;
  int64_t* weights;
};

namespace {

constexpr double kScale = double(int64_t(1) << 40);
constexpr double kLog2E = 1.44269504088896338700;
constexpr double kLn2High = 6.93147180369123816490e-01;
constexpr double kLn2Low = 1.90821492927058770002e-10;
constexpr double kSmallestExponent = -30.0;
constexpr double kTaylor[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                              1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                              1.0 / 120,        1.0 / 24,        1.0 / 6,        1.0 / 2,
                              1.0,              1.0};

// Bins of a weight's logarithm: 6 bits below its leading one, 41 powers of two.
constexpr int kBinBits = 6;
constexpr int kBins = 41 << kBinBits;
constexpr int64_t kTile = 1024;

inline int64_t weight_of(double logit, double top, double temperature) {
  double exponent = (logit - top) / temperature;
  exponent = exponent > kSmallestExponent ? exponent : kSmallestExponent;
  const double halvings = std::floor(exponent * kLog2E + 0.5);
  const double reduced = exponent - halvings * kLn2High - halvings * kLn2Low;
  double result = kTaylor[0];
  for (int i = 1; i < int(sizeof kTaylor / sizeof *kTaylor); ++i)
    result = result * reduced + kTaylor[i];
  const int64_t bits = (int64_t(halvings) + (1023 + 40)) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return int64_t(result * power);
}

void fill_weights(const float* logits, int64_t count, double temperature, int64_t* weights) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) top = logits[i] > top ? logits[i] : top;
  for (int64_t i = 0; i < count; ++i) weights[i] = weight_of(logits[i], top, temperature);
}

// Grows with the weight, which is above zero.
inline int bin_of(int64_t weight) {
  const double wide = double(weight);
  int64_t bits;
  std::memcpy(&bits, &wide, sizeof bits);
  return int((bits >> (52 - kBinBits)) - (int64_t(1023) << kBinBits));
}

struct Histogram {
  int64_t count[kBins] = {};
  int64_t mass[kBins] = {};
};

// The largest weight t for which the values of all weights >= t sum to at least `needed`; 0 if all of
// them do not. The value of a weight is 1, or itself.
template <class Value>
int64_t threshold(const int64_t* weights, int64_t vocabulary, const int64_t* binned, int64_t needed,
                  std::vector<int64_t>& candidates, const Value& value) {
  int bin = kBins - 1;
  for (; bin >= 0 && binned[bin] < needed; --bin) needed -= binned[bin];
  if (bin < 0) return 0;
  candidates.clear();
  for (int64_t i = 0; i < vocabulary; ++i)
    if (weights[i] > 0 && bin_of(weights[i]) == bin) candidates.push_back(weights[i]);
  std::sort(candidates.begin(), candidates.end(), std::greater<int64_t>());
  for (int64_t weight : candidates) {
    needed -= value(weight);
    if (needed <= 0) return weight;
  }
  return 0;
}

int64_t kept_from(const int64_t* weights, int64_t vocabulary, int64_t limit) {
  int64_t sum = 0;
  for (int64_t i = 0; i < vocabulary; ++i) sum += weights[i] >= limit ? weights[i] : 0;
  return sum;
}

int64_t top_k_top_p(const int64_t* weights, int64_t vocabulary, int64_t top_k, double top_p,
                    std::vector<int64_t>& candidates) {
  const bool has_k = top_k > 0 && top_k < vocabulary;
  if (!has_k && !(top_p < 1.0)) return 0;
  Histogram histogram;
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (weights[i] == 0) continue;
    const int bin = bin_of(weights[i]);
    histogram.count[bin] += 1;
    histogram.mass[bin] += weights[i];
  }
  int64_t limit = 0;
  if (has_k)
    limit = threshold(weights, vocabulary, histogram.count, top_k, candidates,
                      [](int64_t) { return int64_t(1); });
  if (!(top_p < 1.0)) return limit;
  const int64_t kept = kept_from(weights, vocabulary, limit);
  const int64_t needed = std::min(int64_t(std::ceil(top_p * double(kept))), kept);
  return std::max(limit, threshold(weights, vocabulary, histogram.mass, needed, candidates,
                                   [](int64_t weight) { return weight; }));
}

int64_t invert(const int64_t* weights, int64_t vocabulary, int64_t limit, double uniform,
               std::vector<int64_t>& tiles) {
  tiles.clear();
  int64_t total = 0;
  for (int64_t begin = 0; begin < vocabulary; begin += kTile) {
    const int64_t width = std::min(kTile, vocabulary - begin);
    tiles.push_back(kept_from(weights + begin, width, limit));
    total += tiles.back();
  }
  // Rounding of the product must not reach the total.
  int64_t left = std::min(int64_t(uniform * double(total)), total - 1);
  int64_t token = 0;
  for (const int64_t tile : tiles) {
    if (tile > left) break;
    left -= tile;
    token += kTile;
  }
  for (; token < vocabulary - 1; ++token) {
    left -= weights[token] >= limit ? weights[token] : 0;
    if (left < 0) break;
  }
  return token;
}

}  // namespace

KVR_OP(sample) {
  parallel_for(args->rows.get(), 1, [&](int64_t begin, int64_t end) {
    thread_local std::vector<int64_t> weights, scratch;
    const int64_t vocabulary = args->vocabulary;
    weights.resize(vocabulary);
    for (int64_t row = begin; row < end; ++row) {
      fill_weights(args->logits + row * args->stride, vocabulary, args->temperature[row],
                   weights.data());
      const int64_t least = int64_t(std::ceil(args->min_p[row] * kScale));
      const int64_t limit = std::max(least, top_k_top_p(weights.data(), vocabulary, args->top_k[row],
                                                        args->top_p[row], scratch));
      args->tokens[row] = invert(weights.data(), vocabulary, limit, args->uniform[row], scratch);
    }
  });
}

KVR_OP(integer_weights) {
  parallel_for(args->rows.get(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      fill_weights(args->logits + row * args->stride, args->vocabulary, args->temperature[row],
                   args->weights + row * args->vocabulary);
  });
}

}  // namespace kvr
