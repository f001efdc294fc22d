// How the work of one attention call is cut: which thread computes what never changes a result, so the
// cuts may follow the load.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace kvr {

// What differs between the steps of a recorded sequence of ops. Mirrored in paged_attention.py.
struct AttentionLayoutArgs {
  const int32_t* block_tables;   // [sequences, table_stride]
  int64_t table_stride;
  const int32_t* query_starts;   // [sequences + 1]
  const int32_t* context_lens;   // [sequences]
  int64_t sequences;
};

// Keys are taken in chunks at fixed positions. Each has a softmax of its own, and a row's chunks are
// merged in ascending order: this order is what makes a result the same in every batch.
constexpr int64_t kChunk = 256;
constexpr int64_t kItemRows = 96;        // query rows that share the keys packed for them
constexpr int64_t kBandwidthRows = 16;   // with fewer, reading keys and values is what takes the time
constexpr int64_t kSerialCost = 1 << 18; // a few microseconds: not worth a second thread

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// Neighbouring query tokens of one sequence.
struct Item {
  int64_t sequence;
  int64_t row;          // packed row of the first token
  int64_t tokens;
  int64_t position;     // of the first token
  int64_t window;
  Range chunks;         // that any of its tokens sees
  int64_t partial;      // where its chunks' results go, in rows; -1: one task merges them as it goes

  // The keys of a chunk that a token sees, relative to the chunk.
  Range visible(int64_t token, int64_t chunk) const {
    int64_t last = position + token, start = chunk * kChunk;
    return {std::max<int64_t>(last - window + 1 - start, 0), std::min(last + 1 - start, kChunk)};
  }
};

struct Task {
  int64_t item;
  Range heads;    // KV heads
  Range chunks;
};

struct Plan {
  std::vector<Item> items;
  std::vector<Task> tasks;
  int64_t partial_rows;
  int64_t cost;

  void build(const AttentionLayoutArgs& layout, int64_t group, int64_t kv_heads, int64_t head_dim, int64_t window,
             int64_t threads) {
    items.clear();
    tasks.clear();
    partial_rows = cost = 0;
    for (int64_t sequence = 0; sequence < layout.sequences; ++sequence) add_sequence(layout, sequence, group, window);
    for (const Item& item : items) cost += item_cost(item, group, head_dim) * kv_heads;
    // Several tasks a thread, so that the last one to finish is not much later than the others.
    int64_t limit = threads > 1 && cost > kSerialCost ? cost / (4 * threads) : cost;
    // Later tokens of a prompt see more keys: the largest tasks first.
    for (int64_t i = int64_t(items.size()) - 1; i >= 0; --i)
      if (items[i].tokens > 1) add_tasks(i, group, kv_heads, head_dim, limit);
    for (int64_t i = 0; i < int64_t(items.size()); ++i)
      if (items[i].tokens == 1) add_tasks(i, group, kv_heads, head_dim, limit);
  }

 private:
  void add_sequence(const AttentionLayoutArgs& layout, int64_t sequence, int64_t group, int64_t window) {
    int64_t row = layout.query_starts[sequence], tokens = layout.query_starts[sequence + 1] - row;
    int64_t position = layout.context_lens[sequence] - tokens;
    int64_t most = std::max<int64_t>(kItemRows / group, 1);
    for (int64_t done = 0; done < tokens; done += most) {
      int64_t first = position + done, count = std::min(most, tokens - done);
      int64_t oldest = std::max<int64_t>(first - window + 1, 0);
      Range chunks{oldest / kChunk, (first + count - 1) / kChunk + 1};
      items.push_back({sequence, row + done, count, first, window, chunks, -1});
    }
  }

  // Multiply-adds of one KV head, and what it takes to read and pack a key as if it were eight rows.
  static int64_t item_cost(const Item& item, int64_t group, int64_t head_dim) {
    int64_t last = item.position + item.tokens;
    int64_t keys = last - std::max<int64_t>(item.position - item.window + 1, 0);
    return keys * head_dim * (item.tokens * group + 8);
  }

  void add_tasks(int64_t index, int64_t group, int64_t kv_heads, int64_t head_dim, int64_t limit) {
    Item& item = items[index];
    int64_t rows = item.tokens * group, count = item.chunks.end - item.chunks.begin;
    int64_t head_cost = item_cost(item, group, head_dim);
    // All heads of a key lie side by side in memory: where reading them is what takes the time, one
    // thread should.
    bool together = head_cost * kv_heads <= limit ||
                    (rows <= kBandwidthRows && head_cost * kv_heads / count <= limit);
    int64_t heads = together ? kv_heads : 1;
    int64_t chunks = std::clamp<int64_t>(limit * count / (head_cost * heads), 1, count);
    if (chunks < count) {
      item.partial = partial_rows;
      partial_rows += kv_heads * count * rows;
    }
    for (int64_t chunk = item.chunks.begin; chunk < item.chunks.end; chunk += chunks)
      for (int64_t head = 0; head < kv_heads; head += heads)
        tasks.push_back({index, {head, head + heads}, {chunk, std::min(chunk + chunks, item.chunks.end)}});
  }
};

}  // namespace kvr
