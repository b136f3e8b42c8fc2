// Assembles the samples of one data-parallel rank's step in buffers of the caller.
// llm/data/samples/sampler.py does the same with NumPy.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "core/corpus.h"
#include "core/packing.h"
#include "core/schedule.h"

namespace ingot {

// Which samples of each step are this rank's: the dp_rank-th of dp_size equal slices.
struct Share {
  int64_t dp_rank;
  int64_t dp_size;
  int64_t micro_batch;  // rows whose documents are numbered together
};

// One corpus of the blend, by its number in the schedule.
struct SampledCorpus {
  std::shared_ptr<const Corpus> tokens;
  uint32_t eod;
  bool eod_first;
  std::map<int64_t, std::shared_ptr<const PackPlan>> plans;  // by seq_len; empty: chunks
};

// A step's memory; T is the phase's sequence length. Null: not wanted.
struct Buffers {
  unsigned char* tokens;   // [rows, T + 1] in the corpora's item size, or int64
  int64_t* sample_ids;     // [rows]
  int32_t* position_ids;   // [rows, T]
  int32_t* cu_seqlens;     // [rows / micro_batch, micro_batch * T + 1]
  unsigned char* counted;  // [rows, T]
};

struct StepInfo {
  size_t phase = 0;
  int64_t target_count = 0;        // over all ranks, as long as no sample is replaced
  int64_t skipped = 0;             // samples of this rank that could not be read and were replaced
  int64_t replaced_targets = 0;    // by how much that changed this rank's targets (packed samples)
  std::vector<int64_t> documents;  // of each micro-batch; empty unless documents are masked
};

class Sampler {
 public:
  // Buffers must have room for every phase; `widen`: tokens as int64. std::invalid_argument when the
  // parts do not fit.
  Sampler(std::vector<SampledCorpus> corpora, std::shared_ptr<const Schedule> schedule, Share share,
          bool packed, bool document_masks, bool skip_damaged, bool widen);

  // The step that begins after `consumed` samples. read_ahead: ask for all its pages first.
  // Throws DamagedFile (see skip_damaged) and std::out_of_range past 2^63 samples.
  StepInfo fill(int64_t consumed, const Buffers& out, bool read_ahead) const;

  // `consumed` after the step that begins there.
  int64_t next(int64_t consumed) const;
  const Schedule& schedule() const { return *schedule_; }
  const Share& share() const { return share_; }
  // Bytes of a token as it is delivered.
  int token_size() const { return widen_ ? 8 : corpora_.front().tokens->item_size(); }
  bool packed() const { return packed_; }
  bool document_masks() const { return document_masks_; }

 private:
  using Readers = std::vector<std::optional<Corpus::Reader>>;  // by corpus, made when first used

  Corpus::Reader& reader(Readers& readers, int32_t corpus) const;
  void read_ahead(Readers& readers, const std::vector<Location>& locations, int64_t seq_len) const;
  // Copies the sample at `location`, or the one taken instead, which `location` then is: true.
  bool read_row(Readers& readers, Location& location, size_t phase, unsigned char* row) const;
  void read_sample(Readers& readers, const Location& location, int64_t seq_len, unsigned char* row) const;
  int64_t targets_of_step(int64_t consumed, const SchedulePhase& phase) const;
  const PackPlan& plan(int32_t corpus, int64_t seq_len) const;

  std::vector<SampledCorpus> corpora_;
  std::shared_ptr<const Schedule> schedule_;
  Share share_;
  bool packed_, document_masks_, skip_damaged_, widen_;
};

}  // namespace ingot
