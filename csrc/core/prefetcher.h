// Threads that fill a ring of buffers with the coming steps, which are handed out in order.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "core/sampler.h"

namespace ingot {

class Prefetcher {
 public:
  struct Ready {
    size_t slot;  // whose buffers hold the step, until next() is called again
    StepInfo info;
  };

  // Steps from `consumed` on, `slots.size()` >= 2 of them at a time, by `threads` >= 1 threads.
  Prefetcher(std::shared_ptr<const Sampler> sampler, int64_t consumed, std::vector<Buffers> slots,
             int threads);
  ~Prefetcher() { close(); }
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // The next step, or nothing when none was ready within `patience`. Rethrows what went wrong in
  // a thread (again at every later call) and throws std::runtime_error after close().
  std::optional<Ready> next(std::chrono::milliseconds patience);
  void close();  // ends and joins the threads; may be called again

 private:
  struct Slot {
    bool ready = false;
    StepInfo info;
    std::exception_ptr error;
  };

  void work();

  std::shared_ptr<const Sampler> sampler_;
  std::vector<Buffers> buffers_;

  std::mutex mutex_;                // guards what follows
  std::condition_variable freed_;   // enough slots became free, or closing
  std::condition_variable filled_;  // a slot became ready, or closing
  std::vector<Slot> slots_;         // step s lies in slots_[s % size]
  int64_t consumed_;                // where the next step to be given to a thread begins
  int64_t started_ = 0;             // steps given to threads
  int64_t taken_ = 0;               // steps handed out
  int64_t released_ = 0;            // steps whose buffers may be overwritten
  bool closing_ = false;
  std::mutex join_mutex_;  // one close() at a time joins
  std::vector<std::thread> threads_;
};

}  // namespace ingot
