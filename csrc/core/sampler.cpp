#include "core/sampler.h"

#include <limits>
#include <stdexcept>
#include <utility>

#include "core/documents.h"
#include "core/text.h"

namespace ingot {
namespace {

constexpr int kTries = 1000;     // samples tried for one that cannot be read
constexpr int64_t kTouched = 4;  // rows ahead whose first lines are loaded

}  // namespace

Sampler::Sampler(std::vector<SampledCorpus> corpora, std::shared_ptr<const Schedule> schedule,
                 Share share, bool packed, bool document_masks, bool skip_damaged, bool widen)
    : corpora_(std::move(corpora)),
      schedule_(std::move(schedule)),
      share_(share),
      packed_(packed),
      document_masks_(document_masks),
      skip_damaged_(skip_damaged),
      widen_(widen) {
  if (corpora_.empty()) throw std::invalid_argument("expected at least one corpus");
  if (packed && !document_masks)
    throw std::invalid_argument("packed samples need document masks");
  if (share.dp_rank < 0 || share.dp_rank >= share.dp_size || share.micro_batch < 1)
    throw std::invalid_argument("expected 0 <= dp_rank < dp_size and micro_batch >= 1");
  for (const SampledCorpus& corpus : corpora_)
    if (corpus.tokens->item_size() != corpora_.front().tokens->item_size())
      throw std::invalid_argument("the corpora of a blend have ids of different sizes");
  for (const SchedulePhase& phase : schedule_->phases()) {
    const auto largest = std::numeric_limits<int32_t>::max();
    if (phase.global_batch % (share.dp_size * share.micro_batch) != 0)
      throw std::invalid_argument("global_batch must be a multiple of dp_size * micro_batch");
    if (phase.seq_len > largest / 8 || phase.global_batch > largest ||
        share.micro_batch > largest / (phase.seq_len + 1))
      throw std::invalid_argument(text("a micro-batch of ", share.micro_batch, " x ", phase.seq_len,
                                       " tokens is too large"));
    for (const Source& source : phase.sources) {
      if (source.corpus < 0 || static_cast<size_t>(source.corpus) >= corpora_.size())
        throw std::invalid_argument("the schedule names a corpus that is not there");
      // n_samples is what keeps every location inside the corpus.
      const auto& corpus = corpora_[static_cast<size_t>(source.corpus)];
      const int64_t samples = packed_ ? plan(source.corpus, phase.seq_len).rows()
                                      : (corpus.tokens->size() - 1) / phase.seq_len;
      if (samples < 1 || source.n_samples != static_cast<uint64_t>(samples))
        throw std::invalid_argument(text("corpus ", source.corpus, " has ", samples, " samples of ",
                                         phase.seq_len, " tokens, the schedule says ",
                                         source.n_samples));
    }
  }
}

const PackPlan& Sampler::plan(int32_t corpus, int64_t seq_len) const {
  const auto& plans = corpora_[static_cast<size_t>(corpus)].plans;
  const auto found = plans.find(seq_len);
  if (found == plans.end())
    throw std::invalid_argument(
        text("corpus ", corpus, " has no plan for samples of ", seq_len, " tokens"));
  return *found->second;
}

int64_t Sampler::next(int64_t consumed) const {
  int64_t sum = 0;
  if (__builtin_add_overflow(consumed, schedule_->phase(consumed).global_batch, &sum))
    throw std::out_of_range("sample numbers must stay below 2^63");
  return sum;
}

Corpus::Reader& Sampler::reader(Readers& readers, int32_t corpus) const {
  auto& found = readers[static_cast<size_t>(corpus)];
  if (!found) found.emplace(*corpora_[static_cast<size_t>(corpus)].tokens);
  return *found;
}

void Sampler::read_ahead(Readers& readers, const std::vector<Location>& locations,
                         int64_t seq_len) const {
  for (const Location& location : locations) {
    Corpus::Reader& from = reader(readers, location.corpus);
    if (!packed_) {
      from.will_need(location.position * seq_len, seq_len + 1);
      continue;
    }
    for (const Piece& piece : plan(location.corpus, seq_len).pieces(location.position))
      from.will_need(piece.start, piece.tokens);
  }
}

void Sampler::read_sample(Readers& readers, const Location& location, int64_t seq_len,
                          unsigned char* row) const {
  Corpus::Reader& from = reader(readers, location.corpus);
  if (!packed_) {
    from.read(location.position * seq_len, seq_len + 1, row, widen_);
    return;
  }
  const auto width = static_cast<size_t>(token_size());
  int64_t used = 0;
  for (const Piece& piece : plan(location.corpus, seq_len).pieces(location.position)) {
    from.read(piece.start, piece.tokens, row + static_cast<size_t>(used) * width, widen_);
    used += piece.tokens;
  }
  pad_row(row, token_size(), used, seq_len + 1, corpora_[static_cast<size_t>(location.corpus)].eod);
}

bool Sampler::read_row(Readers& readers, Location& location, size_t phase, unsigned char* row) const {
  const int64_t seq_len = schedule_->phases()[phase].seq_len;
  for (int skipped = 0;; ++skipped) {
    try {
      read_sample(readers, location, seq_len, row);
      return skipped > 0;
    } catch (const DamagedFile&) {
      if (!skip_damaged_ || skipped == kTries) throw;
      location = schedule_->after(location, phase);
    }
  }
}

int64_t Sampler::targets_of_step(int64_t consumed, const SchedulePhase& phase) const {
  if (!packed_) return phase.global_batch * phase.seq_len;
  std::vector<Location> all(static_cast<size_t>(phase.global_batch));
  schedule_->locate(consumed, phase.global_batch, all.data());
  int64_t targets = 0;
  for (const Location& location : all) targets += plan(location.corpus, phase.seq_len).targets(location.position);
  return targets;
}

StepInfo Sampler::fill(int64_t consumed, const Buffers& out, bool ahead) const {
  next(consumed);  // refuses numbers beyond 2^63
  StepInfo info;
  info.phase = schedule_->phase_index(consumed);
  const SchedulePhase& phase = schedule_->phases()[info.phase];
  const int64_t rows = phase.global_batch / share_.dp_size, T = phase.seq_len;
  const int64_t first = consumed + share_.dp_rank * rows;
  std::vector<Location> locations(static_cast<size_t>(rows));
  schedule_->locate(first, rows, locations.data());
  if (packed_)
    for (const Source& source : phase.sources) plan(source.corpus, T).check_not_truncated();
  Readers readers(corpora_.size());
  if (ahead) read_ahead(readers, locations, T);
  const auto row_bytes = static_cast<size_t>((T + 1) * token_size());
  int32_t* starts = out.cu_seqlens;
  for (int64_t i = 0; i < rows; ++i) {
    Location& location = locations[static_cast<size_t>(i)];
    unsigned char* row = out.tokens + static_cast<size_t>(i) * row_bytes;
    if (!packed_ && i + kTouched < rows) {  // it travels to the processor during the rows before it
      const Location& coming = locations[static_cast<size_t>(i + kTouched)];
      reader(readers, coming.corpus).touch(coming.position * T);
    }
    const int64_t planned = location.position;
    if (read_row(readers, location, info.phase, row)) {
      ++info.skipped;
      if (packed_) {
        const PackPlan& rows_of = plan(location.corpus, T);
        info.replaced_targets += rows_of.targets(location.position) - rows_of.targets(planned);
      }
    }
    out.sample_ids[i] = first + i;
    if (!document_masks_) continue;
    const int64_t within = i % share_.micro_batch;
    if (within == 0) {
      starts = out.cu_seqlens + i / share_.micro_batch * (share_.micro_batch * T + 1);
      info.documents.push_back(0);
    }
    const auto base = static_cast<int32_t>(within * T);
    const SampledCorpus& corpus = corpora_[static_cast<size_t>(location.corpus)];
    int64_t count = 0;
    if (packed_) {
      const auto pieces = plan(location.corpus, T).pieces(location.position);
      count = lay_out_pieces(pieces.begin(), static_cast<int64_t>(pieces.size()), T, base,
                             out.position_ids + i * T, starts, out.counted + i * T);
    } else {
      // Where they lie the tokens take fewer bytes than in a widened row.
      const Corpus::Reader& from = reader(readers, location.corpus);
      const unsigned char* narrow = widen_ ? from.last_read(location.position * T, T + 1) : nullptr;
      const int size = narrow ? corpus.tokens->item_size() : token_size();
      count = scan_documents(narrow ? narrow : row, size, T, corpus.eod, corpus.eod_first, base,
                             out.position_ids + i * T, starts);
    }
    starts += count;
    info.documents.back() += count;
    if (within == share_.micro_batch - 1)
      *starts = static_cast<int32_t>(share_.micro_batch * T);
  }
  info.target_count = targets_of_step(consumed, phase);
  return info;
}

}  // namespace ingot
