#include "core/order.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace ingot {

uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;  // splitmix64's increment, 2^64 / golden ratio

int half_bits(uint64_t n) {
  const int bits = n > 1 ? 64 - __builtin_clzll(n - 1) : 0;
  return bits < 2 ? 1 : (bits + 1) / 2;
}

// Samples are permuted side by side: one alone spends its time waiting for its own multiplications.
constexpr size_t kLanes = 8;
constexpr size_t kBlock = 32;
constexpr size_t kFew = 2;  // so many are done sooner one after another

// One pass of `Lanes` values through the Feistel network.
template <size_t Lanes>
void network(uint64_t* value, int half, uint64_t mask, const std::array<uint64_t, kRounds>& keys) {
  uint64_t left[Lanes], right[Lanes];
  for (size_t i = 0; i < Lanes; ++i) {
    left[i] = value[i] >> half;
    right[i] = value[i] & mask;
  }
  for (const uint64_t key : keys) {
    for (size_t i = 0; i < Lanes; ++i) {
      const uint64_t next = left[i] ^ (mix64(right[i] ^ key) & mask);
      left[i] = right[i];
      right[i] = next;
    }
  }
  for (size_t i = 0; i < Lanes; ++i) value[i] = (left[i] << half) | right[i];
}

}  // namespace

Permutation::Permutation(uint64_t seed, uint64_t epoch, uint64_t n) : n_(n), half_(1), mask_(1) {
  if (n == 0) throw std::invalid_argument("a sample order needs at least one sample");
  half_ = half_bits(n);
  mask_ = (uint64_t{1} << half_) - 1;
  const uint64_t state = mix64(mix64(seed + kGolden) + epoch * kGolden);
  for (int round = 0; round < kRounds; ++round)
    keys_[static_cast<size_t>(round)] = mix64(state + static_cast<uint64_t>(round + 1) * kGolden);
}

uint64_t Permutation::operator()(uint64_t i) const {
  int64_t position = 0;
  range(i, 1, &position);
  return static_cast<uint64_t>(position);
}

void Permutation::range(uint64_t first, int64_t count, int64_t* out) const {
  if (first >= n_ || count < 0 || static_cast<uint64_t>(count) > n_ - first)
    throw std::out_of_range("sample number is outside the epoch");
  // What still walks, and where in `out` it belongs.
  std::array<uint64_t, kBlock> value{};
  std::array<int64_t, kBlock> target{};
  size_t walking = 0;
  for (int64_t next = 0;;) {
    for (; walking < kBlock && next < count; ++walking, ++next) {
      value[walking] = first + static_cast<uint64_t>(next);
      target[walking] = next;
    }
    if (walking == 0) return;
    size_t done = 0;
    for (; done + kFew < walking; done += kLanes)  // the last lanes may compute old values, unused
      network<kLanes>(&value[done], half_, mask_, keys_);
    for (; done < walking; ++done) network<1>(&value[done], half_, mask_, keys_);
    size_t kept = 0;
    for (size_t i = 0; i < walking; ++i) {  // without branches, which nothing could predict
      out[target[i]] = static_cast<int64_t>(value[i]);
      value[kept] = value[i];
      target[kept] = target[i];
      kept += value[i] >= n_ ? 1 : 0;
    }
    walking = kept;
  }
}

void sample_positions(uint64_t seed, uint64_t n, uint64_t first, int64_t count, int64_t* out) {
  if (n == 0 || n > uint64_t{1} << 62)
    throw std::invalid_argument("number of samples must be between 1 and 2^62");
  const auto largest = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  if (count < 0 || first > largest || static_cast<uint64_t>(count) > largest - first)
    throw std::out_of_range("sample numbers must stay below 2^63");
  for (int64_t done = 0; done < count;) {  // one turn per epoch that the range touches
    const uint64_t sample = first + static_cast<uint64_t>(done);
    const uint64_t i = sample % n;
    const int64_t part = std::min(static_cast<int64_t>(n - i), count - done);
    Permutation(seed, sample / n, n).range(i, part, out + done);
    done += part;
  }
}

}  // namespace ingot
