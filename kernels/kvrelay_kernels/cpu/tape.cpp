// A recorded sequence of ops, run in one call from Python.
#include "ops.hpp"

namespace kvr {

struct call {
  void (*op)(const void* args);
  const void* args;
};

struct replay_args {
  const call* calls;
  int64_t begin;
  int64_t end;
};

}  // namespace kvr

KVR_OP(replay) {
  for (int64_t i = args->begin; i < args->end; ++i) args->calls[i].op(args->calls[i].args);
}
