// The threads of the CPU kernels. One loop runs on them at a time; a second caller works alone.
#pragma once

#include <cstdint>
#include <type_traits>

namespace kvr {

using Body = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body for slices of [0, tasks) that are `grain` long (the last may be shorter), each on some
// thread, and returns when all are done. Slices are taken as threads come free.
void run_parallel(int64_t tasks, int64_t grain, Body body, const void* context);

template <class Function>
void parallel_for(int64_t tasks, int64_t grain, const Function& function) {
  run_parallel(
      tasks, grain,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Function*>(context))(begin, end);
      },
      &function);
}

int thread_count();

}  // namespace kvr
