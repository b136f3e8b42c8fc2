#include "core/schedule.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

#include "core/order.h"
#include "core/text.h"

namespace ingot {
namespace {

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

template <typename... Parts>
void require(bool condition, const Parts&... message) {
  if (!condition) throw std::invalid_argument(text(message...));
}

void check_phase(const SchedulePhase& phase, const SchedulePhase* before) {
  if (before == nullptr)
    require(phase.first_sample == 0, "the first phase begins at sample ", phase.first_sample,
            ", expected 0");
  else
    require(phase.first_sample > before->first_sample, "a phase begins at sample ",
            phase.first_sample, ", the one before it at ", before->first_sample);
  require(phase.global_batch >= 1 && phase.seq_len >= 1,
          "expected global_batch >= 1 and seq_len >= 1");
  require(phase.sources.size() == phase.shares.size(), phase.sources.size(), " sources and ",
          phase.shares.size(), " shares");
  std::vector<int> corpora;
  for (const Source& source : phase.sources) {
    require(source.corpus >= 0, "expected the number of a corpus, found a negative one");
    require(source.n_samples >= 1 && source.n_samples <= uint64_t{1} << 62,
            "number of samples must be between 1 and 2^62");
    require(source.first_ordinal <= static_cast<uint64_t>(kLargest),
            "first_ordinal must stay below 2^63");
    corpora.push_back(source.corpus);
  }
  std::sort(corpora.begin(), corpora.end());
  require(std::adjacent_find(corpora.begin(), corpora.end()) == corpora.end(),
          "a corpus is twice in one phase");
}

}  // namespace

Schedule::Schedule(uint64_t seed, std::vector<SchedulePhase> phases)
    : seed_(seed), phases_(std::move(phases)) {
  require(!phases_.empty(), "a schedule needs at least one phase");
  for (size_t i = 0; i < phases_.size(); ++i) {
    check_phase(phases_[i], i == 0 ? nullptr : &phases_[i - 1]);
    std::shared_ptr<const BlendTable> table;
    for (const auto& known : tables_)
      if (known->shares() == phases_[i].shares) table = known;
    tables_.push_back(table ? table : std::make_shared<const BlendTable>(phases_[i].shares));
  }
}

size_t Schedule::phase_index(int64_t sample) const {
  if (sample < 0) throw std::out_of_range("a sample number is negative");
  const auto later = std::upper_bound(
      phases_.begin(), phases_.end(), sample,
      [](int64_t number, const SchedulePhase& phase) { return number < phase.first_sample; });
  return static_cast<size_t>(later - phases_.begin()) - 1;
}

uint64_t Schedule::seed_of(int corpus) const {
  return seed_ ^ mix64(static_cast<uint64_t>(corpus));
}

// Writes the locations of a source's samples `ordinal`, ordinal + 1, ... to out[slots[0..count)].
void Schedule::draw(const Source& source, uint64_t ordinal, const size_t* slots, size_t count,
                    Location* out) const {
  std::vector<int64_t> positions(count);
  sample_positions(seed_of(source.corpus), source.n_samples, ordinal, static_cast<int64_t>(count),
                   positions.data());
  uint64_t epoch = ordinal / source.n_samples, left = source.n_samples - ordinal % source.n_samples;
  for (size_t i = 0; i < count; ++i, --left) {
    if (left == 0) {
      ++epoch;
      left = source.n_samples;
    }
    out[slots[i]] = {source.corpus, positions[i], epoch};
  }
}

void Schedule::locate(int64_t first, int64_t count, Location* out) const {
  if (count < 0 || first > kLargest - count)
    throw std::out_of_range("sample numbers must stay below 2^63");
  const size_t index = phase_index(first);
  if (count == 0) return;
  require(phase_index(first + count - 1) == index, "samples ", first, " to ", first + count - 1,
          " lie in several phases");
  const std::vector<Source>& sources = phases_[index].sources;
  const auto begin = static_cast<uint64_t>(first - phases_[index].first_sample);
  // The samples of each source follow one another in its order, so they are drawn together. A
  // counting sort finds them: in the end those of source s are slots[ends[s - 1]..ends[s]).
  const auto n = static_cast<size_t>(count);
  std::vector<size_t> slots(n), ends(sources.size() + 1, 0);
  std::vector<BlendTable::Entry> entries(n);
  for (size_t i = 0; i < n; ++i) {
    entries[i] = tables_[index]->at(begin + i);
    ++ends[entries[i].source + 1];
  }
  for (size_t s = 1; s < ends.size(); ++s) ends[s] += ends[s - 1];
  for (size_t i = 0; i < n; ++i) slots[ends[entries[i].source]++] = i;
  for (size_t i = 0; i < n;) {
    const BlendTable::Entry& entry = entries[slots[i]];
    const Source& source = sources[entry.source];
    const size_t end = ends[entry.source];
    draw(source, source.first_ordinal + entry.ordinal, &slots[i], end - i, out);
    i = end;
  }
}

Location Schedule::after(const Location& location, size_t phase) const {
  if (phase >= phases_.size()) throw std::out_of_range("there is no such phase");
  for (const Source& source : phases_[phase].sources) {
    if (source.corpus != location.corpus) continue;
    const Permutation permute(seed_of(location.corpus), location.epoch, source.n_samples);
    const uint64_t next = permute(static_cast<uint64_t>(location.position));
    return {location.corpus, static_cast<int64_t>(next), location.epoch};
  }
  throw std::out_of_range(text("the phase does not draw from corpus ", location.corpus));
}

}  // namespace ingot
