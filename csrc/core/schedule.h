// Maps a global sample number to a corpus and a position, through a run's phases and their blends.
//
// Sample i of a phase is the blend's sample i - first. The blend names a source, and how many of its
// samples come before. Counted on from the source's first ordinal, that gives the epoch and the position
// in the corpus's own order, keyed by the corpus. llm/data/samples/schedule.py computes the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/blend.h"

namespace ingot {

// A corpus as one phase draws from it.
struct Source {
  int corpus;
  uint64_t n_samples;      // of seq_len tokens, 1 to 2^62
  uint64_t first_ordinal;  // samples of this corpus's order that earlier phases have passed
};

struct SchedulePhase {
  int64_t first_sample;
  int64_t global_batch;
  int64_t seq_len;
  std::vector<Source> sources;
  std::vector<uint32_t> shares;  // of the sources, as BlendTable has them
};

struct Location {
  int32_t corpus;
  int64_t position;  // below the corpus's n_samples
  uint64_t epoch;
};

// Immutable, so that any number of threads may ask.
class Schedule {
 public:
  // std::invalid_argument on phases that are none: out of order, with no source, with one twice...
  Schedule(uint64_t seed, std::vector<SchedulePhase> phases);

  // The phase that a sample belongs to. std::out_of_range for a negative sample.
  size_t phase_index(int64_t sample) const;
  const SchedulePhase& phase(int64_t sample) const { return phases_[phase_index(sample)]; }
  const std::vector<SchedulePhase>& phases() const { return phases_; }

  // Writes the locations of samples first, first + 1, ... to out[0..count). std::invalid_argument
  // unless they lie in one phase, std::out_of_range beyond 2^63.
  void locate(int64_t first, int64_t count, Location* out) const;

  // The location that is read instead of one that cannot be read: the epoch's permutation applied to
  // its position once more. std::out_of_range when the phase does not draw from its corpus.
  Location after(const Location& location, size_t phase) const;

 private:
  uint64_t seed_of(int corpus) const;
  void draw(const Source& source, uint64_t ordinal, const size_t* slots, size_t count,
            Location* out) const;

  uint64_t seed_;
  std::vector<SchedulePhase> phases_;
  std::vector<std::shared_ptr<const BlendTable>> tables_;  // of the phases; equal shares have one
};

}  // namespace ingot
