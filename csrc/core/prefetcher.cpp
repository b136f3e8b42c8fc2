#include "core/prefetcher.h"

#include <sys/resource.h>

#include <stdexcept>
#include <utility>

namespace ingot {
namespace {

constexpr int kColdSteps = 64;  // steps read ahead after one that had to wait for the disk

// Pages that this thread has waited for since it began.
int64_t major_faults() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_majflt;
}

}  // namespace

Prefetcher::Prefetcher(std::shared_ptr<const Sampler> sampler, int64_t consumed,
                       std::vector<Buffers> slots, int threads)
    : sampler_(std::move(sampler)),
      buffers_(std::move(slots)),
      slots_(buffers_.size()),
      consumed_(consumed) {
  if (consumed < 0) throw std::invalid_argument("expected consumed >= 0");
  if (buffers_.size() < 2 || threads < 1)
    throw std::invalid_argument("expected at least 2 slots and 1 thread");
  try {
    for (int i = 0; i < threads; ++i) threads_.emplace_back(&Prefetcher::work, this);
  } catch (...) {  // no more threads to be had: those that started must not outlive this object
    close();
    throw;
  }
}

void Prefetcher::work() {
  const auto depth = static_cast<int64_t>(slots_.size());
  // The first step is always read ahead: nothing is known of the page cache yet.
  int cold_steps = 1;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    freed_.wait(lock, [&] { return closing_ || started_ < released_ + depth; });
    if (closing_) return;
    const int64_t step = started_++;
    const int64_t consumed = consumed_;
    Slot& slot = slots_[static_cast<size_t>(step % depth)];
    try {
      consumed_ = sampler_->next(consumed);
    } catch (...) {  // out of numbers: this step says so, and so do those after it
      slot.error = std::current_exception();
    }
    if (!slot.error) {
      lock.unlock();
      const int64_t before = major_faults();
      try {
        const Buffers& buffers = buffers_[static_cast<size_t>(step % depth)];
        slot.info = sampler_->fill(consumed, buffers, cold_steps > 0);
      } catch (...) {
        slot.error = std::current_exception();
      }
      cold_steps = major_faults() > before ? kColdSteps : cold_steps - (cold_steps > 0);
      lock.lock();
    }
    slot.ready = true;
    if (step == taken_) filled_.notify_all();
  }
}

std::optional<Prefetcher::Ready> Prefetcher::next(std::chrono::milliseconds patience) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto depth = static_cast<int64_t>(slots_.size());
  if (released_ < taken_) {  // the step handed out before is done with
    released_ = taken_;
    // Threads are woken for half a ring at a time: waking costs more than assembling a small step.
    if (2 * (started_ - released_) <= depth) freed_.notify_all();
  }
  const auto at = static_cast<size_t>(taken_ % depth);
  Slot& slot = slots_[at];
  if (!filled_.wait_for(lock, patience, [&] { return closing_ || slot.ready; })) return {};
  if (closing_) throw std::runtime_error("the loader is closed");
  if (slot.error) std::rethrow_exception(slot.error);
  slot.ready = false;
  ++taken_;
  return Ready{at, std::move(slot.info)};
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
