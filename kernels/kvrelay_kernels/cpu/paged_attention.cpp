// Attention of packed query rows over a paged pool; the formula is in ../paged_attention.py.
//
// A task is some neighbouring tokens of one sequence with all query heads of one KV head: these rows
// share every key and value, which are read once. Per chunk of keys:
//
//   scores = queries x keys      the keys transposed into panels of sixteen, a few panels at a time
//   softmax of each row          over exactly the keys that it sees
//   out    = weights x values    the same
//
// and the chunks are merged in ascending order. What a row does not see is neither multiplied by zero nor
// added, so that whatever lies there (NaN, another sequence) cannot show.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>

#include "exp.hpp"
#include "ops.hpp"
#include "paged_attention_plan.hpp"
#include "paged_attention_tile.hpp"
#include "threads.hpp"

namespace kvr {

struct paged_attention_args {
  const AttentionLayoutArgs* layout;
  const float* query;        // [tokens, heads, head_dim]
  int64_t query_stride;      // between tokens
  int64_t query_head_stride;
  const void* key_cache;     // [blocks, block_size, kv_heads, head_dim]
  const void* value_cache;
  int64_t format;            // Format of the caches
  int64_t block_size;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;          // multiple of 16
  float* out;                // [tokens, heads, head_dim]
  double scale;
  double soft_cap;           // 0: none
  int64_t window;            // 0: none
};

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kScoreStride = kChunk + kLanes;   // rows a multiple of 4 KiB apart would share cache sets

// Memory that grows to the largest call and stays.
class Buffer {
 public:
  float* floats(int64_t count) {
    if (count > size_) {
      size_ = (count + kLanes - 1) / kLanes * kLanes;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float))));
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// The softmax of a row so far: out is sum 2^(score - top) * value, not yet divided by the sum.
struct Row {
  float top, sum;
};

void merge(Row& row, float* out, const Row& chunk, const float* chunk_out, int64_t head_dim) {
  float top = row.top > chunk.top ? row.top : chunk.top;
  // All scores -infinity: any finite base leaves them without weight.
  float base = top == -kInfinity ? 0.0f : top;
  native_f32 before = exp2(broadcast(row.top - base)), added = exp2(broadcast(chunk.top - base));
  row.top = top;
  row.sum = multiply_add(broadcast(chunk.sum), added, broadcast(row.sum) * before)[0];
  for (int64_t d = 0; d < head_dim; d += kNative)
    store(out + d, multiply_add(load_native(chunk_out + d), added, load_native(out + d) * before));
}

void finish(const Row& row, const float* merged, int64_t head_dim, float* out) {
  for (int64_t d = 0; d < head_dim; d += kNative) store(out + d, load_native(merged + d) / row.sum);
}

// Scores become weights, in place. `cap` is in units of the scores, which are logarithms to base 2; 0: none.
Row softmax(float* scores, Range keys, float cap) {
  int64_t begin = keys.begin / kLanes * kLanes, end = (keys.end + kLanes - 1) / kLanes * kLanes;
  if (cap != 0)
    for (int64_t k = begin; k < end; k += kNative) store(scores + k, tanh(load_native(scores + k)) * cap);
  for (int64_t k = begin; k < keys.begin; ++k) scores[k] = -kInfinity;
  for (int64_t k = keys.end; k < end; ++k) scores[k] = -kInfinity;
  native_f32 most[kParts], total[kParts] = {};
  std::fill_n(most, kParts, broadcast(-kInfinity));
  for (int64_t k = begin; k < end; k += kLanes)
#pragma GCC unroll 4
    for (int n = 0; n < kParts; ++n) {
      native_f32 score = load_native(scores + k + n * kNative);
      most[n] = score > most[n] ? score : most[n];
    }
  float top = maximum(load<f32x16>(most));
  native_f32 base = broadcast(top == -kInfinity ? 0.0f : top);
  for (int64_t k = begin; k < end; k += kLanes)
#pragma GCC unroll 4
    for (int n = 0; n < kParts; ++n) {
      native_f32 weight = exp2(load_native(scores + k + n * kNative) - base);
      store(scores + k + n * kNative, weight);
      total[n] = total[n] + weight;
    }
  return {top, sum(load<f32x16>(total))};
}

// Rows [begin(i), begin(i + 1)) for i < count: blocks of at most `most` rows, as even as possible.
struct Blocks {
  int64_t rows, count;
  Blocks(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t begin(int64_t block) const { return block * rows / count; }
};

// What a task keeps of its rows, head by head, and of the keys and values that they share.
struct Memory {
  float *queries, *scores, *panels, *values, *merged, *chunk_out;
  Row *merged_rows, *chunk_rows;
  Range* keys;

  Memory(Buffer& buffer, int64_t heads, int64_t rows, int64_t head_dim) {
    constexpr int64_t kRow = sizeof(Row) / sizeof(float), kRange = sizeof(Range) / sizeof(float);
    int64_t all = heads * rows;
    int64_t shared = (kPanelsAtOnce * kLanes + kChunk) * head_dim + kRange * rows;
    float* at = buffer.floats(all * (3 * head_dim + kScoreStride + 2 * kRow) + shared);
    auto take = [&](int64_t count) { return at += count, at - count; };
    queries = take(all * head_dim);
    scores = take(all * kScoreStride);
    panels = take(kPanelsAtOnce * kLanes * head_dim);
    values = take(kChunk * head_dim);
    merged = take(all * head_dim);
    chunk_out = take(all * head_dim);
    keys = reinterpret_cast<Range*>(take(kRange * rows));
    merged_rows = reinterpret_cast<Row*>(take(kRow * all));
    chunk_rows = reinterpret_cast<Row*>(take(kRow * all));
  }
};

// Where the outputs of a chunk go: out + head * head_stride + row * row_stride.
struct ChunkOut {
  float* out;
  int64_t head_stride, row_stride;
};

// The computation of one task.
template <class T>
class Worker {
 public:
  Worker(const paged_attention_args& args, const Item& item, Range heads, Buffer& buffer)
      : args_(args),
        item_(item),
        first_head_(heads.begin),
        heads_(heads.end - heads.begin),
        group_(args.heads / args.kv_heads),
        rows_(item.tokens * group_),
        dim_(args.head_dim),
        score_blocks_(rows_, kScoreRows),
        memory_(buffer, heads_, rows_, dim_),
        keys_(static_cast<const char*>(args.key_cache) + first_head_ * dim_ * sizeof(T)),
        values_(static_cast<const char*>(args.value_cache) + first_head_ * dim_ * sizeof(T)) {
    for (int64_t head = 0; head < heads_; ++head) pack_queries(head);
  }

  // Compute chunks one after the other and write the rows of `out`.
  void run(Range chunks) {
    int64_t all = heads_ * rows_;
    std::fill_n(memory_.merged_rows, all, Row{-kInfinity, 0.0f});
    std::fill_n(memory_.merged, all * dim_, 0.0f);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      compute(chunk, memory_.chunk_rows, {memory_.chunk_out, rows_ * dim_, dim_});
      for (int64_t i = 0, r = 0; i < all; ++i, r = r + 1 < rows_ ? r + 1 : 0)
        if (!memory_.keys[r].empty())
          merge(memory_.merged_rows[i], memory_.merged + i * dim_, memory_.chunk_rows[i],
                memory_.chunk_out + i * dim_, dim_);
    }
    for (int64_t head = 0, i = 0; head < heads_; ++head)
      for (int64_t token = 0; token < item_.tokens; ++token) {
        float* out = args_.out + ((item_.row + token) * args_.heads + (first_head_ + head) * group_) * dim_;
        for (int64_t g = 0; g < group_; ++g, ++i)
          finish(memory_.merged_rows[i], memory_.merged + i * dim_, dim_, out + g * dim_);
      }
  }

  // Compute one chunk; the rows that see nothing of it are left as they are.
  void compute(int64_t chunk, Row* rows, const ChunkOut& to) {
    for (int64_t token = 0, r = 0; token < item_.tokens; ++token)
      for (int64_t g = 0; g < group_; ++g) memory_.keys[r++] = item_.visible(token, chunk);
    Range seen{memory_.keys[0].begin, memory_.keys[rows_ - 1].end};
    locate(chunk, seen);
    int64_t first = seen.begin / kLanes * kLanes;
    // The panels of a step stay in the first-level cache while all rows use them. All heads of a key lie side
    // by side in memory and are read together.
    int64_t step = dim_ <= 64 || rows_ <= kScoreRows ? kStepKeys : kStepKeys / 2;
    for (int64_t k = first; k < seen.end; k += step)
      for (int64_t head = 0; head < heads_; ++head) {
        Rows ahead = k + step < seen.end ? keys(head, k + step) : values(head, first);
        compute_scores(head, {k, std::min(k + step, seen.end)}, ahead);
      }
    // Scores are logarithms to base 2, except that a cap comes first.
    float cap = float(args_.soft_cap * kLog2E);
    for (int64_t head = 0, i = 0; head < heads_; ++head)
      for (int64_t r = 0; r < rows_; ++r, ++i) {
        std::fill_n(to.out + head * to.head_stride + r * to.row_stride, dim_, 0.0f);
        if (!memory_.keys[r].empty()) rows[i] = softmax(scores(head, r), memory_.keys[r], cap);
      }
    step = rows_ <= kBandwidthRows ? kStepKeys : kChunk;
    for (int64_t k = first; k < seen.end; k += step)
      for (int64_t head = 0; head < heads_; ++head) {
        Rows ahead = k + step < seen.end ? values(head, 0) : keys(head, 0);
        compute_values(head, {std::max(k, seen.begin), std::min(k + step, seen.end)}, ahead, to);
      }
  }

 private:
  float* scores(int64_t head, int64_t row) const { return memory_.scores + (head * rows_ + row) * kScoreStride; }
  float* queries(int64_t head, int64_t row) const { return memory_.queries + (head * rows_ + row) * dim_; }
  Rows keys(int64_t head, int64_t first) const { return {keys_ + head * dim_ * sizeof(T), offsets_ + first}; }
  Rows values(int64_t head, int64_t first) const { return {values_ + head * dim_ * sizeof(T), offsets_ + first}; }

  void pack_queries(int64_t head) {
    float factor = float(args_.soft_cap != 0 ? args_.scale / args_.soft_cap : args_.scale * M_LOG2E);
    for (int64_t b = 0; b < score_blocks_.count; ++b) {
      int64_t first = score_blocks_.begin(b), count = score_blocks_.begin(b + 1) - first;
      float* packed = queries(head, first);
      for (int64_t r = 0; r < count; ++r) {
        int64_t row = first + r;
        const float* query = args_.query + (item_.row + row / group_) * args_.query_stride +
                             ((first_head_ + head) * group_ + row % group_) * args_.query_head_stride;
        for (int64_t d = 0; d < dim_; ++d) packed[d * count + r] = query[d] * factor;
      }
    }
  }

  // Where the keys of a chunk lie, and those of a step after it. Whole panels are read: beside the keys that
  // a row sees stands the nearest of them, never one of another sequence.
  void locate(int64_t chunk, Range seen) {
    const int32_t* table = args_.layout->block_tables + item_.sequence * args_.layout->table_stride;
    int64_t size = args_.block_size, start = chunk * kChunk, stride = args_.kv_heads * dim_ * sizeof(T);
    int64_t end = std::min(seen.end + kStepKeys, item_.position + item_.tokens - start);
    int64_t block = (start + seen.begin) / size, within = (start + seen.begin) % size;
    for (int64_t k = seen.begin; k < end; ++block, within = 0)
      for (int64_t first = table[block] * size; within < size && k < end; ++within, ++k)
        offsets_[k] = (first + within) * stride;
    for (int64_t k = seen.begin / kLanes * kLanes; k < seen.begin; ++k) offsets_[k] = offsets_[seen.begin];
    for (int64_t k = seen.end; k % kLanes; ++k) offsets_[k] = offsets_[seen.end - 1];
    for (int64_t k = std::max(seen.end, end); k < seen.end + kStepKeys + kLanes; ++k) offsets_[k] = offsets_[end - 1];
  }

  // Scores of at most kPanelsAtOnce panels; `seen` begins with one.
  void compute_scores(int64_t head, Range seen, const Rows& ahead) {
    int64_t first = seen.begin / kLanes, last = (seen.end + kLanes - 1) / kLanes, panel = kLanes * dim_;
    for (int64_t p = first; p < last; ++p)
      pack_panel<T>(keys(head, 0), p * kLanes, dim_, memory_.panels + (p - first) * panel);
    for (int64_t b = 0; b < score_blocks_.count; ++b) {
      int64_t row = score_blocks_.begin(b), end = score_blocks_.begin(b + 1);
      int64_t begin = std::max(first, memory_.keys[row].begin / kLanes);
      int64_t count = std::min(last, (memory_.keys[end - 1].end + kLanes - 1) / kLanes) - begin;
      if (count > 0)
        score_rows(int(end - row), queries(head, row), memory_.panels + (begin - first) * panel, count, dim_,
                   scores(head, row) + begin * kLanes, kScoreStride, ahead);
    }
  }

  void compute_values(int64_t head, Range seen, const Rows& ahead, const ChunkOut& to) {
    if (rows_ <= kValueRows) return weigh_all<T>(head, seen, values(head, 0), ahead, to);
    // Widened and moved together once for all rows.
    for (int64_t k = seen.begin; k < seen.end; ++k) {
      packed_[k] = k * dim_ * sizeof(float);
      const T* row = values(head, 0).template row<T>(k);
      for (int64_t d = 0; d < dim_; d += kLanes) store_f32(memory_.values + k * dim_ + d, load_f32(row + d));
    }
    weigh_all<float>(head, seen, {reinterpret_cast<const char*>(memory_.values), packed_}, ahead, to);
  }

  template <class V>
  void weigh_all(int64_t head, Range seen, const Rows& values, const Rows& ahead, const ChunkOut& to) {
    Blocks blocks(rows_, kValueRows);
    for (int64_t b = 0; b < blocks.count; ++b) {
      int64_t first = blocks.begin(b), end = blocks.begin(b + 1);
      auto weigh = [&](int64_t row, int64_t count, int64_t from, int64_t until) {
        from = std::max(from, seen.begin);
        until = std::min(until, seen.end);
        if (from < until)
          weigh_rows<V>(int(count), dim_, scores(head, row), kScoreStride, values, ahead, from, until,
                        to.out + head * to.head_stride + row * to.row_stride, to.row_stride);
      };
      // Most keys are seen by all rows of the block; the others by one row at a time.
      Range shared{memory_.keys[end - 1].begin, memory_.keys[first].end};
      if (shared.empty()) shared = {kChunk, kChunk};
      for (int64_t r = first; r < end; ++r)
        weigh(r, 1, memory_.keys[r].begin, std::min(memory_.keys[r].end, shared.begin));
      weigh(first, end - first, shared.begin, shared.end);
      for (int64_t r = first; r < end; ++r)
        weigh(r, 1, std::max(memory_.keys[r].begin, shared.end), memory_.keys[r].end);
    }
  }

  const paged_attention_args& args_;
  const Item& item_;
  const int64_t first_head_, heads_, group_, rows_, dim_;
  const Blocks score_blocks_;
  Memory memory_;
  const char* keys_;     // of the first head
  const char* values_;
  int64_t offsets_[kChunk + kStepKeys + kLanes], packed_[kChunk];
};

// Results of single chunks: a row's output, then its top and sum.
struct Partials {
  float* data;
  int64_t head_dim;

  int64_t stride() const { return head_dim + kLanes; }
  float* row(const Item& item, int64_t rows, int64_t head, int64_t chunk) const {
    int64_t chunks = item.chunks.end - item.chunks.begin;
    return data + (item.partial + (head * chunks + chunk - item.chunks.begin) * rows) * stride();
  }
};

template <class T>
void run_task(const paged_attention_args& args, const Plan& plan, const Task& task, const Partials& partials) {
  static thread_local Buffer buffer;
  const Item& item = plan.items[task.item];
  Worker<T> worker(args, item, task.heads, buffer);
  if (item.partial < 0) return worker.run(task.chunks);
  static thread_local std::vector<Row> stats;
  int64_t heads = task.heads.end - task.heads.begin, rows = item.tokens * (args.heads / args.kv_heads);
  stats.resize(std::max<size_t>(stats.size(), heads * rows));
  int64_t head_stride = (item.chunks.end - item.chunks.begin) * rows * partials.stride();
  for (int64_t chunk = task.chunks.begin; chunk < task.chunks.end; ++chunk) {
    float* to = partials.row(item, rows, task.heads.begin, chunk);
    worker.compute(chunk, stats.data(), {to, head_stride, partials.stride()});
    for (int64_t i = 0; i < heads * rows; ++i)
      std::memcpy(to + i / rows * head_stride + i % rows * partials.stride() + args.head_dim, &stats[i], sizeof(Row));
  }
}

// The same merges as in Worker::run, over chunks that several tasks have computed.
void merge_partials(const paged_attention_args& args, const Item& item, int64_t head, const Partials& partials) {
  static thread_local Buffer buffer;
  int64_t group = args.heads / args.kv_heads, rows = item.tokens * group;
  float* merged = buffer.floats(args.head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    Row row{-kInfinity, 0.0f};
    std::fill_n(merged, args.head_dim, 0.0f);
    for (int64_t chunk = item.chunks.begin; chunk < item.chunks.end; ++chunk) {
      if (item.visible(r / group, chunk).empty()) continue;
      const float* part = partials.row(item, rows, head, chunk) + r * partials.stride();
      Row stats;
      std::memcpy(&stats, part + args.head_dim, sizeof stats);
      merge(row, merged, stats, part, args.head_dim);
    }
    int64_t token = item.row + r / group;
    finish(row, merged, args.head_dim,
           args.out + (token * args.heads + head * group + r % group) * args.head_dim);
  }
}

template <class T>
void run(const paged_attention_args& args) {
  static thread_local Plan plan;
  static thread_local Buffer buffer;
  const Plan& planned = plan;   // a lambda that runs elsewhere would see its own thread's
  int64_t window = args.window ? args.window : std::numeric_limits<int32_t>::max();
  plan.build(*args.layout, args.heads / args.kv_heads, args.kv_heads, args.head_dim, window, thread_count());
  Partials partials{nullptr, args.head_dim};
  partials.data = buffer.floats(plan.partial_rows * partials.stride());
  int64_t tasks = plan.tasks.size();
  parallel_for(tasks, plan.cost > kSerialCost ? 1 : tasks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run_task<T>(args, planned, planned.tasks[i], partials);
  });
  if (plan.partial_rows == 0) return;
  int64_t heads = args.kv_heads;
  parallel_for(plan.items.size() * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Item& item = planned.items[i / heads];
      if (item.partial >= 0) merge_partials(args, item, i % heads, partials);
    }
  });
}

}  // namespace
}  // namespace kvr

KVR_OP(paged_attention) {
  using namespace kvr;
  if (args->format == kFloat32) run<float>(*args);
  if (args->format == kBFloat16) run<bfloat16>(*args);
  if (args->format == kFloat16) run<float16>(*args);
}
