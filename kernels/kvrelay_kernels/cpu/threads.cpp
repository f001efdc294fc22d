#include "threads.hpp"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvr {
namespace {

// Between two ops of a step there are a few microseconds: a thread that slept would be late for
// every one of them. Between two steps of an idle worker it must sleep.
constexpr int kSpins = 1 << 12;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
  }

  ~Pool() {
    stopping_ = true;
    announce();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return int(workers_.size()) + 1; }

  void run(int64_t tasks, int64_t grain, Body body, const void* context) {
    if (workers_.empty() || tasks <= grain || !busy_.try_lock()) {
      for (int64_t begin = 0; begin < tasks; begin += grain)
        body(context, begin, begin + grain < tasks ? begin + grain : tasks);
      return;
    }
    std::lock_guard<std::mutex> running(busy_, std::adopt_lock);
    tasks_ = tasks;
    grain_ = grain;
    body_ = body;
    context_ = context;
    next_.store(0, std::memory_order_relaxed);
    working_.store(int(workers_.size()), std::memory_order_relaxed);
    announce();
    work();
    // The others may be off their cores: spinning on would take the core they need.
    for (int spins = 0; working_.load(std::memory_order_acquire) > 0; ++spins)
      spins < kSpins ? relax() : std::this_thread::yield();
  }

 private:
  void announce() {
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> guard(mutex_);
      wake_.notify_all();
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      wait_for_round(seen);
      ++seen;
      if (stopping_) return;
      work();
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  void wait_for_round(uint64_t seen) {
    for (int spins = 0; spins < kSpins; ++spins) {
      if (round_.load(std::memory_order_acquire) > seen) return;
      relax();
    }
    std::unique_lock<std::mutex> guard(mutex_);
    sleeping_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(guard, [&] { return round_.load(std::memory_order_seq_cst) > seen; });
    sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }

  void work() {
    for (;;) {
      int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (begin >= tasks_) return;
      body_(context_, begin, begin + grain_ < tasks_ ? begin + grain_ : tasks_);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex busy_;  // held by the one caller whose loop runs
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> working_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stopping_{false};
  int64_t tasks_ = 0, grain_ = 1;
  Body body_ = nullptr;
  const void* context_ = nullptr;
};

std::mutex pool_mutex;
// Never destroyed at exit: static destructors run while other threads may still compute.
std::shared_ptr<Pool>& pool() {
  static auto* current = new std::shared_ptr<Pool>(std::make_shared<Pool>(1));
  return *current;
}

std::shared_ptr<Pool> current_pool() {
  std::lock_guard<std::mutex> guard(pool_mutex);
  return pool();
}

}  // namespace

void run_parallel(int64_t tasks, int64_t grain, Body body, const void* context) {
  current_pool()->run(tasks, grain < 1 ? 1 : grain, body, context);
}

int thread_count() { return current_pool()->threads(); }

}  // namespace kvr

extern "C" void kvr_set_threads(int64_t threads) {
  auto fresh = std::make_shared<kvr::Pool>(threads < 1 ? 1 : int(threads));
  std::shared_ptr<kvr::Pool> old;
  std::lock_guard<std::mutex> guard(kvr::pool_mutex);
  old = kvr::pool();
  kvr::pool() = fresh;
}

extern "C" int64_t kvr_thread_count() { return kvr::thread_count(); }
