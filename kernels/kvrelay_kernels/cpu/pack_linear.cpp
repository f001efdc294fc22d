// Checkpoint tensors into the packed layout of linear.hpp: converted, or quantised with their scales.
#include <algorithm>
#include <cmath>

#include "linear.hpp"
#include "threads.hpp"

namespace kvr {

struct pack_linear_args {
  int64_t parts;
  const void* const* part_data;   // each [part_rows, width], contiguous
  const int64_t* part_rows;
  int64_t source_format;          // Format of the parts: float32, bfloat16 or float16
  int64_t format;                 // Format to pack into
  void* packed;
  float* scale;                   // int8: [outputs]; int16: [tiles, blocks, 32]; else null
  int64_t outputs;
  int64_t width;
};

namespace {

// The 32 source rows of one tile; null past the last output.
template <class From>
struct TileRows {
  const From* row[kTile] = {};

  TileRows(const pack_linear_args& args, int64_t tile) {
    int64_t part = 0, before = 0;
    for (int64_t i = 0; i < kTile; ++i) {
      int64_t n = tile * kTile + i;
      if (n >= args.outputs) break;
      while (n - before >= args.part_rows[part]) before += args.part_rows[part++];
      row[i] = static_cast<const From*>(args.part_data[part]) + (n - before) * args.width;
    }
  }
};

// Inputs [start, start + count) of 32 rows, turned into the order of a tile. `Group` is what stays together:
// two neighbouring inputs in the paired formats, one in the others.
constexpr int64_t kChunk = 64;

template <class Group, class To>
void turn(const To (&rows)[kTile][kChunk], int64_t start, int64_t count, To* packed) {
  constexpr int64_t size = sizeof(Group) / sizeof(To);
  Group* to = reinterpret_cast<Group*>(packed + start * kTile);
  for (int64_t g = 0; g < count / size; ++g)
    for (int64_t i = 0; i < kTile; ++i) to[g * kTile + i] = load<Group>(&rows[i][g * size]);
}

template <class From>
inline void copy_row(const From* from, int64_t count, From* to) {
  std::memcpy(to, from, count * sizeof(From));
}

template <class From, class To>
inline void copy_row(const From* from, int64_t count, To* to) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) store_f32(to + k, load_f32(from + k));
  for (; k < count; ++k) store_one(to + k, to_float(from[k]));
}

template <class From, class To, class Group>
void pack_tile(const pack_linear_args& args, int64_t tile) {
  TileRows<From> source(args, tile);
  To* packed = static_cast<To*>(args.packed) + tile * kTile * args.width;
  To rows[kTile][kChunk] = {};
  for (int64_t start = 0; start < args.width; start += kChunk) {
    int64_t count = std::min(kChunk, args.width - start);
    for (int64_t i = 0; i < kTile; ++i)
      if (source.row[i]) copy_row(source.row[i] + start, count, rows[i]);
    turn<Group>(rows, start, count, packed);
  }
}

// The factor that turns numbers up to `most` into integers up to `limit`.
inline float factor_for(float most, int limit) { return most > 0 ? limit / most : 0.0f; }

template <class From>
void pack_tile_int8(const pack_linear_args& args, int64_t tile) {
  TileRows<From> source(args, tile);
  int8_t* packed = static_cast<int8_t*>(args.packed) + tile * kTile * args.width;
  float factor[kTile] = {};
  for (int64_t i = 0; i < kTile; ++i) {
    if (!source.row[i]) continue;
    float most = largest(source.row[i], args.width);
    args.scale[tile * kTile + i] = most / Int8Blocks::kMostWeight;
    factor[i] = factor_for(most, Int8Blocks::kMostWeight);
  }
  int8_t rows[kTile][kChunk] = {};
  for (int64_t start = 0; start < args.width; start += kChunk) {
    int64_t count = std::min(kChunk, args.width - start);
    for (int64_t i = 0; i < kTile; ++i)
      if (source.row[i]) round_products(source.row[i] + start, factor[i], count, rows[i]);
    turn<uint16_t>(rows, start, count, packed);
  }
}

template <class From>
void pack_tile_int16(const pack_linear_args& args, int64_t tile) {
  static_assert(kChunk == Int16Blocks::kInputs, "a chunk is a block");
  TileRows<From> source(args, tile);
  int16_t* packed = static_cast<int16_t*>(args.packed) + tile * kTile * args.width;
  float* scale = args.scale + tile * kTile * ((args.width + kChunk - 1) / kChunk);
  int16_t rows[kTile][kChunk] = {};
  for (int64_t start = 0; start < args.width; start += kChunk, scale += kTile) {
    int64_t count = std::min(kChunk, args.width - start);
    for (int64_t i = 0; i < kTile; ++i) {
      scale[i] = 0;
      if (!source.row[i]) continue;
      float most = largest(source.row[i] + start, count);
      scale[i] = most / Int16Blocks::kMostWeight;
      round_products(source.row[i] + start, factor_for(most, Int16Blocks::kMostWeight), count, rows[i]);
    }
    turn<uint32_t>(rows, start, count, packed);
  }
}

template <class From>
void pack_from(const pack_linear_args& args) {
  int64_t tiles = (args.outputs + kTile - 1) / kTile;
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) switch (args.format) {
        case kFloat32: pack_tile<From, float, float>(args, tile); break;
        case kFloat16: pack_tile<From, float16, uint16_t>(args, tile); break;
        case kBFloat16: pack_tile<From, bfloat16, uint32_t>(args, tile); break;
        case kInt16: pack_tile_int16<From>(args, tile); break;
        default: pack_tile_int8<From>(args, tile);
      }
  });
}

}  // namespace
}  // namespace kvr

KVR_OP(pack_linear) {
  switch (args->source_format) {
    case kvr::kFloat32: return kvr::pack_from<float>(*args);
    case kvr::kBFloat16: return kvr::pack_from<kvr::bfloat16>(*args);
    default: return kvr::pack_from<kvr::float16>(*args);
  }
}
