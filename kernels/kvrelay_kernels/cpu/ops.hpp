// What every op exported to Python shares. An op is `void kvr_NAME(const NAME_args*)`; its struct has a
// mirror in the Python module of the same name, and `KVR_OP` exports its size so that a mismatch is
// found when the library is loaded.
#pragma once

#include <cstdint>

namespace kvr {

// A count that is either given, or read when the op runs: a recorded step is replayed with other sizes.
struct Count {
  int64_t given;
  const int64_t* live;
  int64_t get() const { return live ? *live : given; }
};

// Storage formats, numbered as in `library.py`.
enum Format : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt8 = 3, kInt16 = 4 };

}  // namespace kvr

#define KVR_OP(name)                                                     \
  extern "C" int64_t kvr_##name##_args_size() { return sizeof(kvr::name##_args); } \
  extern "C" void kvr_##name(const kvr::name##_args* args)
