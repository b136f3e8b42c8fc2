#include "core/prefetcher.h"

#include <limits>
#include <stdexcept>
#include <utility>

namespace ingot {
namespace {

uint64_t sample_count(const TokenStore& store, int64_t seq_len) {
  if (seq_len < 1) throw std::invalid_argument("seq_len must be at least 1");
  const int64_t samples = (store.size() - 1) / seq_len;
  if (samples < 1)
    throw std::invalid_argument("a sample needs " + std::to_string(seq_len) +
                                " + 1 tokens, the file has " + std::to_string(store.size()));
  return static_cast<uint64_t>(samples);
}

}  // namespace

void gather_rows(const TokenStore& store, const int64_t* starts, int64_t rows, int64_t width,
                 void* out) {
  store.check_not_truncated();
  auto* row = static_cast<unsigned char*>(out);
  for (int64_t i = 0; i < rows; ++i, row += width * store.item_size())
    store.read(starts[i], width, row);
}

Prefetcher::Prefetcher(std::shared_ptr<const TokenStore> store, const Plan& plan, int depth,
                       int threads)
    : store_(std::move(store)), plan_(plan), order_(plan.seed, sample_count(*store_, plan.seq_len)) {
  if (plan.first < 0 || plan.rows < 1 || plan.stride < plan.rows)
    throw std::invalid_argument("expected first >= 0 and 1 <= rows <= stride");
  // seq_len < store size < 2^62 / item size, so only the product with rows can overflow.
  const int64_t row_bytes = (plan.seq_len + 1) * store_->item_size();
  if (plan.rows > std::numeric_limits<int64_t>::max() / row_bytes)
    throw std::invalid_argument("a batch of " + std::to_string(plan.rows) + " rows is too large");
  if (depth < 1 || threads < 1) throw std::invalid_argument("expected depth >= 1 and threads >= 1");
  ring_.resize(static_cast<size_t>(depth));
  try {
    for (int i = 0; i < threads; ++i) threads_.emplace_back(&Prefetcher::work, this);
  } catch (...) {  // no more threads to be had: those that started must not outlive this object
    close();
    throw;
  }
}

Prefetcher::Slot Prefetcher::assemble(int64_t step) const noexcept {
  Slot slot;
  try {
    int64_t first = 0;
    if (__builtin_mul_overflow(step, plan_.stride, &first) ||
        __builtin_add_overflow(first, plan_.first, &first))
      throw std::out_of_range("sample numbers must stay below 2^63");
    const auto rows = static_cast<size_t>(plan_.rows);
    const auto row_bytes = static_cast<size_t>((plan_.seq_len + 1) * store_->item_size());
    Batch batch{std::unique_ptr<unsigned char[]>(new unsigned char[rows * row_bytes]),
                std::unique_ptr<int64_t[]>(new int64_t[rows])};
    std::vector<int64_t> starts(rows);
    order_.positions(static_cast<uint64_t>(first), plan_.rows, starts.data());
    for (size_t i = 0; i < rows; ++i) {
      starts[i] *= plan_.seq_len;
      batch.sample_ids[i] = first + static_cast<int64_t>(i);
    }
    gather_rows(*store_, starts.data(), plan_.rows, plan_.seq_len + 1, batch.tokens.get());
    slot.batch = std::move(batch);
  } catch (...) {
    slot.error = std::current_exception();
  }
  return slot;
}

void Prefetcher::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto depth = static_cast<int64_t>(ring_.size());
  while (true) {
    freed_.wait(lock, [&] { return closing_ || started_ < taken_ + depth; });
    if (closing_) return;
    const int64_t step = started_++;
    lock.unlock();
    Slot slot = assemble(step);
    lock.lock();
    ring_[static_cast<size_t>(step % depth)] = std::move(slot);
    filled_.notify_all();
  }
}

std::optional<Batch> Prefetcher::next(std::chrono::milliseconds patience) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto current = [&]() -> Slot& { return ring_[static_cast<size_t>(taken_) % ring_.size()]; };
  if (!filled_.wait_for(lock, patience, [&] { return closing_ || current().ready(); })) return {};
  if (closing_) throw std::runtime_error("the loader is closed");
  Slot& slot = current();
  if (slot.error) std::rethrow_exception(slot.error);
  std::optional<Batch> batch = std::exchange(slot.batch, std::nullopt);
  ++taken_;
  freed_.notify_all();
  return batch;
}

void Prefetcher::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  freed_.notify_all();
  filled_.notify_all();
  const std::lock_guard<std::mutex> lock(join_mutex_);
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
}

}  // namespace ingot
