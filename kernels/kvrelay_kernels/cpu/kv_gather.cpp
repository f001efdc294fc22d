// Whole blocks between the pool and one contiguous buffer, with the digest of kvrelay_kernels/kv_gather.py
// taken from the words on their way.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "ops.hpp"
#include "threads.hpp"

namespace kvr {

struct kv_copy_args {
  char* layers;
  int64_t layer_stride;  // bytes, as is every size here
  int64_t half_stride;   // from keys to values
  int64_t block_bytes;
  int64_t num_layers;
  const int64_t* blocks;
  int64_t num_blocks;
  char* buffer;
  int64_t valid_bytes;  // of the last block; gather writes zeros for the rest
  int64_t scatter;
  uint64_t* sums;  // two, or null without a digest
};

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kFirst = 0xD6E8FEB86659FD93ull;
constexpr uint64_t kSecond = 0xFF51AFD7ED558CCDull;
constexpr int64_t kSliceBytes = 64 << 10;
constexpr int kWords = 8;

typedef uint64_t words_t __attribute__((vector_size(8 * kWords)));

template <class Word>
struct Sums {
  Word first{}, second{};

  void add(Word word, Word offset) {
    const Word x = word + offset;
    const Word y = (x ^ (x >> 32)) * kFirst;
    const Word folded = y ^ (y >> 29);
    const Word z = folded * kSecond;
    first += folded;
    second += z ^ (z >> 32);
  }
};

struct Digest {
  uint64_t first = 0, second = 0;

  // Of `bytes` bytes at `data`, whose first word has the given index in the buffer.
  void add(const char* data, int64_t bytes, uint64_t index) {
    Sums<words_t> wide;
    words_t offset;
    for (int i = 0; i < kWords; ++i) offset[i] = (index + 1 + i) * kGolden;
    int64_t at = 0;
    for (; at + int64_t(sizeof(words_t)) <= bytes; at += sizeof(words_t)) {
      words_t words;
      std::memcpy(&words, data + at, sizeof words);
      wide.add(words, offset);
      offset += kGolden * kWords;
    }
    for (int i = 0; i < kWords; ++i) {
      first += wide.first[i];
      second += wide.second[i];
    }
    Sums<uint64_t> narrow;
    for (; at < bytes; at += 8) {
      uint64_t word;
      std::memcpy(&word, data + at, sizeof word);
      narrow.add(word, (index + 1 + at / 8) * kGolden);
    }
    first += narrow.first;
    second += narrow.second;
  }
};

}  // namespace

KVR_OP(kv_copy) {
  const int64_t bytes = args->block_bytes;
  const int64_t rows = args->num_layers * 2 * args->num_blocks;
  std::atomic<uint64_t> first{0}, second{0};
  parallel_for(rows, std::max<int64_t>(1, kSliceBytes / bytes), [&](int64_t begin, int64_t end) {
    Digest digest;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t place = row % args->num_blocks, half = row / args->num_blocks;
      char* block = args->layers + half / 2 * args->layer_stride + half % 2 * args->half_stride +
                    args->blocks[place] * bytes;
      char* packed = args->buffer + row * bytes;
      if (args->scatter) {
        std::memcpy(block, packed, bytes);
      } else {
        const int64_t valid = place == args->num_blocks - 1 ? args->valid_bytes : bytes;
        std::memcpy(packed, block, valid);
        std::memset(packed + valid, 0, bytes - valid);
      }
      // Of the side that travels, while it is in the first-level cache. After a scatter that is what the
      // blocks now hold: a buffer that changes meanwhile must not pass with its earlier content.
      if (args->sums) digest.add(args->scatter ? block : packed, bytes, uint64_t(row * bytes / 8));
    }
    first.fetch_add(digest.first, std::memory_order_relaxed);
    second.fetch_add(digest.second, std::memory_order_relaxed);
  });
  if (args->sums) {
    args->sums[0] = first.load();
    args->sums[1] = second.load();
  }
}

}  // namespace kvr
