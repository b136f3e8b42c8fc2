// The order of samples: a keyed permutation of 0..n-1 per epoch, computed on the fly.
//
// A balanced Feistel network (Luby & Rackoff 1988) on the smallest even number of bits that holds
// n, applied again until the value is below n (Black & Rogaway 2002). The round function
// is splitmix64's finaliser (Steele et al. 2014). llm/data/samples/order.py computes the same numbers.
#pragma once

#include <array>
#include <cstdint>

namespace ingot {

constexpr int kRounds = 8;

uint64_t mix64(uint64_t x);

// The permutation of one epoch.
class Permutation {
 public:
  Permutation(uint64_t seed, uint64_t epoch, uint64_t n);  // n >= 1, else std::invalid_argument
  uint64_t operator()(uint64_t i) const;                   // i < n, else std::out_of_range
  // Writes the positions of first, first + 1, ... to out[0..count); all below n, else out_of_range.
  void range(uint64_t first, int64_t count, int64_t* out) const;

 private:
  uint64_t n_;
  int half_;       // bits in each half of the network
  uint64_t mask_;  // the lowest half_ bits
  std::array<uint64_t, kRounds> keys_;
};

// Writes the positions of a corpus's samples first, first + 1, ... to out[0..count): sample i lies in
// epoch i / n, at the permuted position of i % n. std::invalid_argument unless 1 <= n <= 2^62,
// std::out_of_range beyond 2^63.
void sample_positions(uint64_t seed, uint64_t n, uint64_t first, int64_t count, int64_t* out);

}  // namespace ingot
