#include "core/order.h"

#include <limits>
#include <stdexcept>

namespace ingot {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;  // splitmix64's increment, 2^64 / golden ratio

int half_bits(uint64_t n) {
  int bits = 0;
  for (uint64_t largest = n - 1; largest != 0; largest >>= 1) ++bits;
  return bits < 2 ? 1 : (bits + 1) / 2;
}

}  // namespace

uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

Permutation::Permutation(uint64_t seed, uint64_t epoch, uint64_t n) : n_(n), half_(1), mask_(1) {
  if (n == 0) throw std::invalid_argument("a sample order needs at least one sample");
  half_ = half_bits(n);
  mask_ = (uint64_t{1} << half_) - 1;
  const uint64_t state = mix64(mix64(seed + kGolden) + epoch * kGolden);
  for (int round = 0; round < kRounds; ++round)
    keys_[static_cast<size_t>(round)] = mix64(state + static_cast<uint64_t>(round + 1) * kGolden);
}

uint64_t Permutation::operator()(uint64_t i) const {
  if (i >= n_) throw std::out_of_range("sample number is outside the epoch");
  do {
    uint64_t left = i >> half_, right = i & mask_;
    for (const uint64_t key : keys_) {
      const uint64_t next = left ^ (mix64(right ^ key) & mask_);
      left = right;
      right = next;
    }
    i = (left << half_) | right;
  } while (i >= n_);
  return i;
}

SampleOrder::SampleOrder(uint64_t seed, uint64_t n) : seed_(seed), n_(n) {
  if (n == 0 || n > uint64_t{1} << 62)
    throw std::invalid_argument("number of samples must be between 1 and 2^62");
}

void SampleOrder::positions(uint64_t first, int64_t count, int64_t* out) const {
  const auto largest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (count < 0 || first > largest || static_cast<uint64_t>(count) > largest - first)
    throw std::out_of_range("sample numbers must stay below 2^63");
  for (int64_t done = 0; done < count;) {  // one turn per epoch that the range touches
    const uint64_t sample = first + static_cast<uint64_t>(done);
    const Permutation permute(seed_, sample / n_, n_);
    for (uint64_t i = sample % n_; i < n_ && done < count; ++i)
      out[done++] = static_cast<int64_t>(permute(i));
  }
}

}  // namespace ingot
