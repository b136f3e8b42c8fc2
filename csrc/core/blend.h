// Says which source each sample of a blend is drawn from: a table of one period, read in O(1).
//
// Tijdeman's rule (The chairman assignment problem, 1980): with n sources, no source ever is more
// than 1 - 1 / (2n - 2) samples from its exact share of the samples drawn so far. No rule does
// better. llm/data/samples/blend.py computes the same table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ingot {

class BlendTable {
 public:
  static constexpr uint64_t kPeriod = 1 << 16;  // samples after which the blend repeats

  struct Entry {
    uint32_t source;
    uint64_t ordinal;  // how many samples of the source come before this one
  };

  // Of each period, source s has shares[s] samples. std::invalid_argument unless each is at least 1
  // and they sum to kPeriod.
  explicit BlendTable(const std::vector<uint32_t>& shares);

  // Sample i of the blend.
  Entry at(uint64_t i) const {
    if (source_.empty()) return {0, i};
    const uint64_t source = source_[i % kPeriod];
    return {static_cast<uint32_t>(source), i / kPeriod * shares_[source] + ordinal_[i % kPeriod]};
  }

  // Samples of `source` among the first n of the blend. std::out_of_range for an unknown source.
  uint64_t count(size_t source, uint64_t n) const;

  const std::vector<uint32_t>& shares() const { return shares_; }

 private:
  std::vector<uint32_t> shares_;
  std::vector<uint16_t> source_, ordinal_;  // of the samples of a period; none for one source
  // Source s has the samples slots_[first_[s]] .. slots_[first_[s + 1] - 1] of the period.
  std::vector<uint16_t> slots_;
  std::vector<uint32_t> first_;
};

}  // namespace ingot
