#include "core/blend.h"

#include <algorithm>
#include <functional>
#include <queue>
#include <stdexcept>
#include <utility>

#include "core/text.h"

namespace ingot {
namespace {

// Earliest first, and of those the lowest source.
using Queue = std::priority_queue<std::pair<uint64_t, uint32_t>,
                                  std::vector<std::pair<uint64_t, uint32_t>>, std::greater<>>;

// The sources of one period. Sample j of source s (from 0) has a window of slots (from 1) in which
// it keeps the source within the bound; of the samples whose window is open, the one whose window
// closes first is drawn. That some order fits every window is Tijdeman's theorem, and for unit jobs
// the earliest deadline first then finds one.
std::vector<uint16_t> sources_of_period(const std::vector<uint32_t>& shares) {
  // The bound is 1 - 1 / slack. Numbers stay below 2^16 * 2^17 * 2^16.
  const uint64_t slack = 2 * shares.size() - 2;
  Queue closed, open;  // (slot at which the window opens, or closes, source)
  std::vector<uint64_t> drawn(shares.size(), 0);
  const auto opens = [&](uint32_t s) {  // the first slot: share * slot >= j + 1 / slack
    const uint64_t width = slack * shares[s];
    return ((drawn[s] * slack + 1) * BlendTable::kPeriod + width - 1) / width;
  };
  const auto closes = [&](uint32_t s) {  // the last one: share * (slot - 1) <= j + 1 - 1 / slack
    return ((drawn[s] + 1) * slack - 1) * BlendTable::kPeriod / (slack * shares[s]) + 1;
  };
  for (uint32_t s = 0; s < shares.size(); ++s) closed.emplace(opens(s), s);
  std::vector<uint16_t> sources;
  sources.reserve(BlendTable::kPeriod);
  for (uint64_t slot = 1; slot <= BlendTable::kPeriod; ++slot) {
    for (; !closed.empty() && closed.top().first <= slot; closed.pop())
      open.emplace(closes(closed.top().second), closed.top().second);
    if (open.empty() || open.top().first < slot)
      throw std::logic_error("the blend has no slot that keeps every source within its bound");
    const uint32_t s = open.top().second;
    open.pop();
    sources.push_back(static_cast<uint16_t>(s));
    ++drawn[s];
    closed.emplace(opens(s), s);
  }
  return sources;
}

}  // namespace

BlendTable::BlendTable(const std::vector<uint32_t>& shares) : shares_(shares) {
  uint64_t total = 0;
  for (const uint32_t share : shares) {
    if (share == 0) throw std::invalid_argument("a share of the blend is 0, expected at least 1");
    total += share;
  }
  if (total != kPeriod)
    throw std::invalid_argument(
        text("the shares of the blend sum to ", total, ", expected ", uint64_t{kPeriod}));
  if (shares.size() == 1) return;
  source_ = sources_of_period(shares);
  first_.push_back(0);
  for (const uint32_t share : shares) first_.push_back(first_.back() + share);
  ordinal_.resize(kPeriod);
  slots_.resize(kPeriod);
  std::vector<uint32_t> drawn(shares.size(), 0);
  for (size_t slot = 0; slot < kPeriod; ++slot) {
    const size_t s = source_[slot];
    ordinal_[slot] = static_cast<uint16_t>(drawn[s]);
    slots_[first_[s] + drawn[s]++] = static_cast<uint16_t>(slot);
  }
}

uint64_t BlendTable::count(size_t source, uint64_t n) const {
  if (source >= shares_.size())
    throw std::out_of_range(text("source ", source, " of a blend of ", shares_.size()));
  if (source_.empty()) return n;
  const auto begin = slots_.begin() + first_[source], end = slots_.begin() + first_[source + 1];
  const auto before = std::lower_bound(begin, end, n % kPeriod);
  return n / kPeriod * shares_[source] + static_cast<uint64_t>(before - begin);
}

}  // namespace ingot
