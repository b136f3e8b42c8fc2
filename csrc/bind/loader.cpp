// Sampler and Prefetcher: steps assembled by threads in memory that Python owns.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bind/bind.h"
#include "core/prefetcher.h"
#include "core/sampler.h"

namespace py = pybind11;
using namespace ingot;

namespace {

// How long a wait for a step goes without looking at signals (Ctrl-C).
constexpr std::chrono::milliseconds kPatience{100};

using CorpusArguments = std::tuple<std::shared_ptr<Corpus>, uint32_t, bool,
                                   std::map<int64_t, std::shared_ptr<PackPlan>>>;
// tokens (bytes), sample_ids, position_ids, cu_seqlens, counted.
using SlotArguments = std::tuple<py::array, py::array, py::array, py::array, py::array>;

std::shared_ptr<Sampler> make_sampler(const std::vector<CorpusArguments>& arguments,
                                      std::shared_ptr<Schedule> schedule, const Share& share,
                                      bool packed, bool document_masks, bool skip_damaged,
                                      bool widen) {
  std::vector<SampledCorpus> corpora;
  for (const auto& [tokens, eod, eod_first, plans] : arguments)
    corpora.push_back({tokens, eod, eod_first, {plans.begin(), plans.end()}});
  return std::make_shared<Sampler>(std::move(corpora), std::move(schedule), share, packed,
                                   document_masks, skip_damaged, widen);
}

// The start of an array that must hold at least `needed` items of T in one piece.
template <typename T>
T* checked(py::array& array, int64_t needed) {
  if (needed == 0) return nullptr;
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(array) || array.size() < needed)
    throw std::invalid_argument("a buffer has " + std::to_string(array.size()) +
                                " items, expected " + std::to_string(needed) + " of " +
                                std::to_string(sizeof(T)) + " bytes side by side");
  return static_cast<T*>(array.mutable_data());
}

Buffers buffers_of(const Sampler& sampler, SlotArguments& slot) {
  int64_t tokens = 0, rows = 0, inputs = 0, starts = 0;
  const Share& share = sampler.share();
  for (const SchedulePhase& phase : sampler.schedule().phases()) {
    const int64_t mine = phase.global_batch / share.dp_size;
    rows = std::max(rows, mine);
    tokens = std::max(tokens, mine * (phase.seq_len + 1) * sampler.token_size());
    inputs = std::max(inputs, mine * phase.seq_len);
    starts = std::max(starts, mine / share.micro_batch * (share.micro_batch * phase.seq_len + 1));
  }
  auto& [token_bytes, sample_ids, position_ids, cu_seqlens, counted] = slot;
  return {checked<uint8_t>(token_bytes, tokens), checked<int64_t>(sample_ids, rows),
          checked<int32_t>(position_ids, sampler.document_masks() ? inputs : 0),
          checked<int32_t>(cu_seqlens, sampler.document_masks() ? starts : 0),
          checked<uint8_t>(counted, sampler.packed() ? inputs : 0)};
}

class PyPrefetcher {
 public:
  PyPrefetcher(const std::shared_ptr<Sampler>& sampler, int64_t consumed,
               std::vector<SlotArguments> slots, int threads)
      : slots_(std::move(slots)) {
    std::vector<Buffers> buffers;
    for (SlotArguments& slot : slots_)
      buffers.push_back(buffers_of(*sampler, slot));
    prefetcher_ = std::make_unique<Prefetcher>(sampler, consumed, std::move(buffers), threads);
  }

  // (slot, phase, target_count, skipped, replaced_targets, documents of each micro-batch)
  py::tuple next() {
    std::optional<Prefetcher::Ready> ready;
    while (!ready) {
      {
        const py::gil_scoped_release without_gil;
        ready = prefetcher_->next(kPatience);
      }
      if (!ready && PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    const StepInfo& info = ready->info;
    return py::make_tuple(ready->slot, info.phase, info.target_count, info.skipped,
                          info.replaced_targets, py::cast(info.documents));
  }

  void close() {
    const py::gil_scoped_release without_gil;
    prefetcher_->close();
  }

 private:
  std::vector<SlotArguments> slots_;  // kept while threads write to them
  std::unique_ptr<Prefetcher> prefetcher_;
};

}  // namespace

void bind_loader(py::module_& module) {
  py::class_<Sampler, std::shared_ptr<Sampler>>(module, "Sampler")
      .def(py::init([](const std::vector<CorpusArguments>& corpora,
                       const std::shared_ptr<Schedule>& schedule, int64_t dp_rank, int64_t dp_size,
                       int64_t micro_batch, bool packed, bool document_masks, bool skip_damaged,
                       bool widen) {
             return make_sampler(corpora, schedule, Share{dp_rank, dp_size, micro_batch}, packed,
                                 document_masks, skip_damaged, widen);
           }),
           py::kw_only(), py::arg("corpora"), py::arg("schedule"), py::arg("dp_rank"), py::arg("dp_size"),
           py::arg("micro_batch"), py::arg("packed"), py::arg("document_masks"),
           py::arg("skip_damaged"), py::arg("widen"));
  py::class_<PyPrefetcher>(module, "Prefetcher")
      .def(py::init<const std::shared_ptr<Sampler>&, int64_t, std::vector<SlotArguments>, int>(),
           py::arg("sampler"), py::arg("consumed"), py::arg("slots"), py::arg("threads"))
      .def("next", &PyPrefetcher::next)
      .def("close", &PyPrefetcher::close);
}
