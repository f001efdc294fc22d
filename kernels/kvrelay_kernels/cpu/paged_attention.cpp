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
#include <type_traits>

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
  f32x16 before = exp2(splat(row.top - base)), added = exp2(splat(chunk.top - base));
  row.top = top;
  row.sum = fma(splat(chunk.sum), added, splat(row.sum) * before)[0];
  for (int64_t d = 0; d < head_dim; d += kLanes)
    store_f32(out + d, fma(load_f32(chunk_out + d), added, load_f32(out + d) * before));
}

void finish(const Row& row, const float* merged, int64_t head_dim, float* out) {
  for (int64_t d = 0; d < head_dim; d += kLanes) store_f32(out + d, load_f32(merged + d) / row.sum);
}

// Scores become weights, in place. `cap` is in units of the scores, which are logarithms to base 2; 0: none.
Row softmax(float* scores, Range keys, float cap) {
  int64_t begin = keys.begin / kLanes * kLanes, end = (keys.end + kLanes - 1) / kLanes * kLanes;
  if (cap != 0)
    for (int64_t k = begin; k < end; k += kLanes) store_f32(scores + k, tanh(load_f32(scores + k)) * cap);
  for (int64_t k = begin; k < keys.begin; ++k) scores[k] = -kInfinity;
  for (int64_t k = keys.end; k < end; ++k) scores[k] = -kInfinity;
  f32x16 most = splat(-kInfinity);
  for (int64_t k = begin; k < end; k += kLanes) most = max(load_f32(scores + k), most);
  float top = maximum(most);
  f32x16 base = splat(top == -kInfinity ? 0.0f : top), total{};
  for (int64_t k = begin; k < end; k += kLanes) {
    f32x16 weight = exp2(load_f32(scores + k) - base);
    store_f32(scores + k, weight);
    total = total + weight;
  }
  return {top, sum(total)};
}

// Rows [begin(i), begin(i + 1)) for i < count: blocks of at most `most` rows, as even as possible.
struct Blocks {
  int64_t rows, count;
  Blocks(int64_t rows, int64_t most) : rows(rows), count((rows + most - 1) / most) {}
  int64_t begin(int64_t block) const { return block * rows / count; }
};

// Where the rows of one item and head are kept while their chunks are computed.
struct Memory {
  float *queries, *scores, *panels, *values, *merged, *chunk_out;
  Row *merged_rows, *chunk_rows;

  Memory(Buffer& buffer, int64_t rows, int64_t head_dim) {
    int64_t per_row = 3 * head_dim + kScoreStride + 4, shared = (kPanelsAtOnce * kLanes + kChunk) * head_dim;
    float* at = buffer.floats(rows * per_row + shared);
    auto take = [&](int64_t count) { return at += count, at - count; };
    queries = take(rows * head_dim);
    scores = take(rows * kScoreStride);
    panels = take(kPanelsAtOnce * kLanes * head_dim);
    values = take(kChunk * head_dim);
    merged = take(rows * head_dim);
    chunk_out = take(rows * head_dim);
    merged_rows = reinterpret_cast<Row*>(take(2 * rows));
    chunk_rows = reinterpret_cast<Row*>(take(2 * rows));
  }
};

template <class T>
class Head {
 public:
  Head(const paged_attention_args& args, const Item& item, int64_t head, Buffer& buffer)
      : args_(args),
        item_(item),
        head_(head),
        group_(args.heads / args.kv_heads),
        rows_(item.tokens * group_),
        dim_(args.head_dim),
        score_blocks_(rows_, kScoreRows),
        memory_(buffer, rows_, dim_),
        keys_(static_cast<const T*>(args.key_cache) + head * dim_),
        values_(static_cast<const T*>(args.value_cache) + head * dim_) {
    pack_queries();
  }

  // Compute chunks one after the other and write the rows of `out`.
  void run(Range chunks) {
    for (int64_t r = 0; r < rows_; ++r) memory_.merged_rows[r] = {-kInfinity, 0.0f};
    std::fill_n(memory_.merged, rows_ * dim_, 0.0f);
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      compute(chunk, memory_.chunk_rows, memory_.chunk_out, dim_);
      for (int64_t r = 0; r < rows_; ++r)
        if (!visible(r, chunk).empty())
          merge(memory_.merged_rows[r], memory_.merged + r * dim_, memory_.chunk_rows[r],
                memory_.chunk_out + r * dim_, dim_);
    }
    for (int64_t r = 0; r < rows_; ++r)
      finish(memory_.merged_rows[r], memory_.merged + r * dim_, dim_, out(r));
  }

  // Compute one chunk into `rows` and `chunk_out`; rows that see nothing of it are left as they are.
  void compute(int64_t chunk, Row* rows, float* chunk_out, int64_t out_stride) {
    Range seen{visible(0, chunk).begin, visible(rows_ - 1, chunk).end};
    locate(chunk, seen);
    compute_scores(chunk, seen);
    // Scores are logarithms to base 2, except that a cap comes first.
    float cap = float(args_.soft_cap * kLog2E);
    for (int64_t r = 0; r < rows_; ++r)
      if (Range keys = visible(r, chunk); !keys.empty()) rows[r] = softmax(scores(r), keys, cap);
    if (std::is_same<T, float>::value || rows_ <= kValueRows)
      return compute_values(chunk, values_, offsets_, chunk_out, out_stride);
    for (int64_t k = seen.begin; k < seen.end; ++k)
      for (int64_t d = 0; d < dim_; d += kLanes)
        store_f32(memory_.values + k * dim_ + d, load_f32(values_ + offsets_[k] + d));
    int64_t packed[kChunk];
    for (int64_t k = 0; k < kChunk; ++k) packed[k] = k * dim_;
    compute_values(chunk, memory_.values, packed, chunk_out, out_stride);
  }

  float* out(int64_t row) const {
    return args_.out + ((item_.row + row / group_) * args_.heads + head_ * group_ + row % group_) * dim_;
  }

  Range visible(int64_t row, int64_t chunk) const { return item_.visible(row / group_, chunk); }

 private:
  float* scores(int64_t row) const { return memory_.scores + row * kScoreStride; }

  void pack_queries() {
    float factor = float(args_.soft_cap != 0 ? args_.scale / args_.soft_cap : args_.scale * M_LOG2E);
    for (int64_t b = 0; b < score_blocks_.count; ++b) {
      int64_t first = score_blocks_.begin(b), count = score_blocks_.begin(b + 1) - first;
      float* packed = memory_.queries + first * dim_;
      for (int64_t r = 0; r < count; ++r) {
        int64_t row = first + r;
        const float* query = args_.query + (item_.row + row / group_) * args_.query_stride +
                             (head_ * group_ + row % group_) * args_.query_head_stride;
        for (int64_t d = 0; d < dim_; ++d) packed[d * count + r] = query[d] * factor;
      }
    }
  }

  // Where the keys of a chunk lie, as offsets from the head's first. Whole panels are read: beside the
  // keys that a row sees stands the nearest of them, never one of another sequence.
  void locate(int64_t chunk, Range seen) {
    const int32_t* table = args_.layout->block_tables + item_.sequence * args_.layout->table_stride;
    int64_t size = args_.block_size, stride = args_.kv_heads * dim_;
    int64_t position = chunk * kChunk + seen.begin, block = position / size, within = position % size;
    for (int64_t k = seen.begin; k < seen.end; ++block, within = 0)
      for (int64_t first = table[block] * size; within < size && k < seen.end; ++within, ++k)
        offsets_[k] = (first + within) * stride;
    for (int64_t k = seen.begin / kLanes * kLanes; k < seen.begin; ++k) offsets_[k] = offsets_[seen.begin];
    for (int64_t k = seen.end; k % kLanes; ++k) offsets_[k] = offsets_[seen.end - 1];
  }

  void compute_scores(int64_t chunk, Range seen) {
    // The panels of a step stay in the first-level cache while all rows use them.
    int64_t step = dim_ <= 64 || rows_ <= kScoreRows ? kPanelsAtOnce : 2;
    Range panels{seen.begin / kLanes, (seen.end + kLanes - 1) / kLanes};
    for (int64_t first = panels.begin; first < panels.end; first += step) {
      int64_t last = std::min(first + step, panels.end);
      for (int64_t p = first; p < last; ++p) {
        if (rows_ <= kBandwidthRows) prefetch(p, step, panels.end);
        pack_panel(keys_, offsets_ + p * kLanes, dim_, memory_.panels + (p - first) * kLanes * dim_);
      }
      for (int64_t b = 0; b < score_blocks_.count; ++b) {
        int64_t row = score_blocks_.begin(b), end = score_blocks_.begin(b + 1);
        Range keys{visible(row, chunk).begin, visible(end - 1, chunk).end};
        int64_t begin = std::max(first, keys.begin / kLanes);
        int64_t count = std::min(last, (keys.end + kLanes - 1) / kLanes) - begin;
        if (count > 0)
          score_rows(int(end - row), memory_.queries + row * dim_, memory_.panels + (begin - first) * kLanes * dim_,
                     count, dim_, scores(row) + begin * kLanes, kScoreStride);
      }
    }
  }

  // Blocks are scattered: the hardware does not see the next one coming. The values of a panel's keys are
  // needed soon after.
  void prefetch(int64_t panel, int64_t ahead, int64_t end) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t k = panel * kLanes; k < (panel + 1) * kLanes; ++k) {
      for (int64_t d = 0; d < dim_; d += kLine) __builtin_prefetch(values_ + offsets_[k] + d);
      if (panel + ahead < end)
        for (int64_t d = 0; d < dim_; d += kLine) __builtin_prefetch(keys_ + offsets_[k + ahead * kLanes] + d);
    }
  }

  template <class V>
  void compute_values(int64_t chunk, const V* values, const int64_t* offsets, float* out, int64_t stride) {
    Blocks blocks(rows_, kValueRows);
    for (int64_t b = 0; b < blocks.count; ++b) {
      int64_t first = blocks.begin(b), end = blocks.begin(b + 1);
      for (int64_t r = first; r < end; ++r) std::fill_n(out + r * stride, dim_, 0.0f);
      // Most keys are seen by all rows of the block; the others by one row at a time.
      Range shared{visible(end - 1, chunk).begin, visible(first, chunk).end};
      if (shared.empty()) shared = {kChunk, kChunk};
      auto weigh = [&](int64_t row, int64_t count, Range keys) {
        if (!keys.empty())
          weigh_rows(int(count), dim_, scores(row), kScoreStride, values, offsets, keys.begin, keys.end,
                     out + row * stride, stride);
      };
      for (int64_t r = first; r < end; ++r) {
        Range keys = visible(r, chunk);
        weigh(r, 1, {keys.begin, std::min(keys.end, shared.begin)});
      }
      weigh(first, end - first, shared);
      for (int64_t r = first; r < end; ++r) {
        Range keys = visible(r, chunk);
        weigh(r, 1, {std::max(keys.begin, shared.end), keys.end});
      }
    }
  }

  const paged_attention_args& args_;
  const Item& item_;
  const int64_t head_, group_, rows_, dim_;
  const Blocks score_blocks_;
  Memory memory_;
  const T* keys_;
  const T* values_;
  int64_t offsets_[kChunk + kLanes];
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
  int64_t rows = item.tokens * (args.heads / args.kv_heads);
  for (int64_t index = task.heads.begin; index < task.heads.end; ++index) {
    Head<T> head(args, item, index, buffer);
    if (item.partial < 0) {
      head.run(task.chunks);
      continue;
    }
    static thread_local std::vector<Row> stats;
    stats.resize(std::max<size_t>(stats.size(), rows));
    for (int64_t chunk = task.chunks.begin; chunk < task.chunks.end; ++chunk) {
      float* to = partials.row(item, rows, index, chunk);
      head.compute(chunk, stats.data(), to, partials.stride());
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(to + r * partials.stride() + args.head_dim, &stats[r], sizeof(Row));
    }
  }
}

// The same merges as in Head::run, over chunks that several tasks have computed.
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
