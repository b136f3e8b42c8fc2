// Assembles the batches of the coming steps in threads and hands them out in order.
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

#include "core/order.h"
#include "core/token_store.h"

namespace ingot {

// Copies `width` tokens from each start into the rows of `out` [starts.size(), width].
void gather_rows(const TokenStore& store, const int64_t* starts, int64_t rows, int64_t width,
                 void* out);

struct Batch {
  std::unique_ptr<unsigned char[]> tokens;  // [rows, seq_len + 1] in the store's item size
  std::unique_ptr<int64_t[]> sample_ids;    // [rows]
};

// What this rank reads: step s takes samples first + s * stride .. + rows of the global order.
struct Plan {
  int64_t seq_len;
  uint64_t seed;
  int64_t first;
  int64_t stride;
  int64_t rows;
};

class Prefetcher {
 public:
  // `depth` batches are assembled ahead by `threads` threads. std::invalid_argument on a bad plan.
  Prefetcher(std::shared_ptr<const TokenStore> store, const Plan& plan, int depth, int threads);
  ~Prefetcher() { close(); }
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // The next batch, or nothing when none was ready within `patience`. Rethrows what went wrong in
  // a thread (again at every later call) and throws std::runtime_error after close().
  std::optional<Batch> next(std::chrono::milliseconds patience);
  void close();  // ends and joins the threads; may be called again

 private:
  struct Slot {
    std::optional<Batch> batch;
    std::exception_ptr error;
    bool ready() const { return batch.has_value() || error != nullptr; }
  };

  Slot assemble(int64_t step) const noexcept;
  void work();

  std::shared_ptr<const TokenStore> store_;
  Plan plan_;
  SampleOrder order_;

  std::mutex mutex_;                  // guards what follows
  std::condition_variable freed_;     // a slot became free, or closing
  std::condition_variable filled_;    // a slot became ready, or closing
  std::vector<Slot> ring_;            // step s lies in ring_[s % depth]
  int64_t started_ = 0;               // steps given to threads
  int64_t taken_ = 0;                 // steps handed out
  bool closing_ = false;
  std::mutex join_mutex_;             // one close() at a time joins
  std::vector<std::thread> threads_;
};

}  // namespace ingot
