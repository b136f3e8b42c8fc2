// The Python module llm.data._native: arrays in and out. The work itself runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "core/documents.h"
#include "core/order.h"
#include "core/prefetcher.h"
#include "core/text.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace ingot;

namespace {

using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// A vector of the fields of Python objects, each read by `read`.
template <typename Read>
auto read_all(const py::iterable& objects, Read read) {
  std::vector<decltype(read(py::handle()))> out;
  for (const py::handle object : objects) out.push_back(read(object));
  return out;
}

size_t checked(int64_t count) {
  if (count < 0) throw std::invalid_argument("count must not be negative");
  return static_cast<size_t>(count);
}

// ---- Corpora ----

py::array read_rows(const Corpus& corpus, const Integers& starts, int64_t width) {
  if (starts.ndim() != 1) throw std::invalid_argument("starts must have one dimension");
  if (width < 0 || width > corpus.size())
    throw std::out_of_range(text("rows of ", width, " tokens lie outside the ", corpus.size(),
                                 " tokens of the corpus"));
  // Ids of four bytes are int32 to Python whatever the file calls them: they lie below 2^31.
  const int size = corpus.item_size();
  const char* dtype = size == 1 ? "u1" : size == 2 ? "u2" : "i4";
  const int64_t rows = starts.shape(0);
  py::array out(py::dtype(dtype), std::vector<py::ssize_t>{rows, width});
  const int64_t* from = starts.data();
  auto* to = static_cast<unsigned char*>(out.mutable_data());
  const py::gil_scoped_release without_gil;
  Corpus::Reader reader(corpus);
  for (int64_t i = 0; i < rows; ++i) reader.will_need(from[i], width);
  for (int64_t i = 0; i < rows; ++i, to += width * size) reader.read(from[i], width, to);
  return out;
}

void bind_corpora(py::module_& module) {
  py::register_exception<DamagedFile>(module, "DamagedFile", PyExc_RuntimeError);
  py::class_<FileCache, std::shared_ptr<FileCache>>(module, "FileCache")
      .def(py::init<>())  // the limit of open files as it is then, not when the module is loaded
      .def(py::init<size_t>(), "capacity"_a)
      .def_property_readonly("opened", &FileCache::opened)
      .def_property_readonly("held", &FileCache::held);
  py::class_<Corpus, std::shared_ptr<Corpus>>(module, "Corpus")
      .def(py::init([](const std::string& format, int item_size, std::vector<std::string> paths,
                       std::vector<int64_t> tokens, int64_t vocab_size,
                       std::shared_ptr<FileCache> cache, std::string sums) {
             return std::make_shared<Corpus>(CorpusSpec{format_named(format), item_size, std::move(paths),
                                                        std::move(tokens), vocab_size, std::move(sums)},
                                             std::move(cache));
           }),
           py::kw_only(), "format"_a, "item_size"_a, "paths"_a, "tokens"_a, "vocab_size"_a,
           py::arg("cache").none(false), "sums"_a = "")
      .def("__len__", &Corpus::size)
      .def("read_rows", &read_rows, "starts"_a, "width"_a);
}

// ---- The order of samples, blends and schedules ----

Integers positions(uint64_t seed, uint64_t n_samples, uint64_t first, int64_t count) {
  Integers out(static_cast<py::ssize_t>(checked(count)));
  int64_t* to = out.mutable_data();
  const py::gil_scoped_release without_gil;
  sample_positions(seed, n_samples, first, count, to);
  return out;
}

py::tuple entries(const BlendTable& table, uint64_t first, int64_t count) {
  std::vector<int32_t> sources(checked(count));
  std::vector<int64_t> ordinals(sources.size());
  for (size_t i = 0; i < sources.size(); ++i) {
    const BlendTable::Entry entry = table.at(first + i);
    sources[i] = static_cast<int32_t>(entry.source);
    ordinals[i] = static_cast<int64_t>(entry.ordinal);
  }
  return py::make_tuple(to_array(sources), to_array(ordinals));
}

Source read_source(const py::handle& source) {
  return {source.attr("corpus").cast<int>(), source.attr("n_samples").cast<uint64_t>(),
          source.attr("first_ordinal").cast<uint64_t>()};
}

// Reads llm.data.samples.schedule.SchedulePhase.
SchedulePhase read_phase(const py::handle& phase) {
  return {phase.attr("first_sample").cast<int64_t>(), phase.attr("global_batch").cast<int64_t>(),
          phase.attr("seq_len").cast<int64_t>(), read_all(phase.attr("sources"), read_source),
          phase.attr("shares").cast<std::vector<uint32_t>>()};
}

py::tuple locate(const Schedule& schedule, int64_t first, int64_t count) {
  std::vector<Location> found(checked(count));
  {
    const py::gil_scoped_release without_gil;
    schedule.locate(first, count, found.data());
  }
  std::vector<int32_t> corpora;
  std::vector<int64_t> within, epochs;
  for (const Location& location : found) {
    corpora.push_back(location.corpus);
    within.push_back(location.position);
    epochs.push_back(static_cast<int64_t>(location.epoch));
  }
  return py::make_tuple(to_array(corpora), to_array(within), to_array(epochs));
}

void bind_order(py::module_& module) {
  module.def("positions", &positions, "seed"_a, "n_samples"_a, "first"_a, "count"_a);
  py::class_<BlendTable>(module, "BlendTable")
      .def(py::init<const std::vector<uint32_t>&>(), "shares"_a)
      .def("entries", &entries, "first"_a, "count"_a)
      .def("count", &BlendTable::count, "source"_a, "n"_a);
  py::class_<Schedule, std::shared_ptr<Schedule>>(module, "Schedule")
      .def(py::init([](uint64_t seed, const py::iterable& phases) {
             return std::make_shared<Schedule>(seed, read_all(phases, read_phase));
           }),
           "seed"_a, "phases"_a)
      .def("phase_index", &Schedule::phase_index, "sample"_a)
      .def("locate", &locate, "first"_a, "count"_a)
      .def("after",
           [](const Schedule& schedule, int corpus, int64_t position, uint64_t epoch, size_t phase) {
             return schedule.after({corpus, position, epoch}, phase).position;
           },
           "corpus"_a, "position"_a, "epoch"_a, "phase"_a);
}

// ---- Documents and packing ----

std::vector<Piece> to_pieces(const Integers& array) {
  if (array.ndim() != 2 || array.shape(1) != 2)
    throw std::invalid_argument("expected pieces [n, 2] of first token and tokens");
  const auto* first = reinterpret_cast<const Piece*>(array.data());
  return {first, first + array.shape(0)};
}

Integers from_pieces(const Piece* pieces, size_t count) {
  Integers out({static_cast<py::ssize_t>(count), py::ssize_t{2}});
  std::copy_n(pieces, count, reinterpret_cast<Piece*>(out.mutable_data()));
  return out;
}

py::tuple scan_rows(const py::array& tokens, uint32_t eod, bool eod_first) {
  const py::array rows = py::array::ensure(tokens, py::array::c_style);
  if (!rows || rows.ndim() != 2 || rows.shape(1) < 2 ||
      (rows.dtype().kind() != 'u' && rows.dtype().kind() != 'i'))
    throw std::invalid_argument("expected token ids [B, T + 1], T >= 1");
  const int64_t B = rows.shape(0), T = rows.shape(1) - 1;
  if (B > 0 && T > std::numeric_limits<int32_t>::max() / B)
    throw std::invalid_argument("more than 2^31 - 1 tokens");
  py::array_t<int32_t> position_ids({B, T});
  std::vector<int32_t> starts(static_cast<size_t>(B * T));
  int64_t count = 0;
  for (int64_t row = 0; row < B; ++row)
    count += scan_documents(rows.data(row), static_cast<int>(rows.itemsize()), T, eod, eod_first,
                            static_cast<int32_t>(row * T), position_ids.mutable_data(row),
                            starts.data() + count);
  starts.resize(static_cast<size_t>(count));
  starts.push_back(static_cast<int32_t>(B * T));
  return py::make_tuple(position_ids, to_array(starts));
}

py::tuple lay_out_row(const Integers& pieces, int64_t seq_len) {
  if (seq_len < 1 || seq_len > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("seq_len must be at least 1 and below 2^31");
  const std::vector<Piece> row = to_pieces(pieces);
  py::array_t<int32_t> position_ids(seq_len);
  py::array_t<uint8_t> counted(seq_len);
  std::vector<int32_t> starts(static_cast<size_t>(seq_len));
  const int64_t count =
      lay_out_pieces(row.data(), static_cast<int64_t>(row.size()), seq_len, 0,
                     position_ids.mutable_data(), starts.data(), counted.mutable_data());
  starts.resize(static_cast<size_t>(count));
  starts.push_back(static_cast<int32_t>(seq_len));
  return py::make_tuple(position_ids, to_array(starts), counted);
}

py::tuple plan_documents(const Integers& documents, int64_t seq_len) {
  const std::vector<Piece> given = to_pieces(documents);
  PackedRows rows;
  {
    const py::gil_scoped_release without_gil;
    rows = plan_window(given, seq_len);
  }
  return py::make_tuple(from_pieces(rows.pieces.data(), rows.pieces.size()), to_array(rows.row_ends));
}

void bind_packing(py::module_& module) {
  module.def("scan_documents", &scan_rows, "tokens"_a, "eod_id"_a, "eod_first"_a);
  module.def("lay_out_pieces", &lay_out_row, "pieces"_a, "seq_len"_a);
  module.def("plan_window", &plan_documents, "documents"_a, "seq_len"_a);
  py::class_<PackPlan, std::shared_ptr<PackPlan>>(module, "PackPlan")
      .def(py::init<const std::string&, int64_t, int64_t>(), "path"_a, "seq_len"_a, "corpus_tokens"_a)
      .def("__len__", &PackPlan::rows)
      .def("pieces",
           [](const PackPlan& plan, int64_t row) {
             const Pieces pieces = plan.pieces(row);
             return from_pieces(pieces.begin(), pieces.size());
           },
           "row"_a)
      .def("targets", &PackPlan::targets, "row"_a)
      .def("check_not_truncated", &PackPlan::check_not_truncated);
}

// ---- Steps, assembled by threads in memory that Python owns ----

// How long a wait for a step goes without looking at signals (Ctrl-C).
constexpr std::chrono::milliseconds kPatience{100};

using CorpusArguments = std::tuple<std::shared_ptr<Corpus>, uint32_t, bool,
                                   std::map<int64_t, std::shared_ptr<PackPlan>>>;
// tokens (bytes), sample_ids, position_ids, cu_seqlens, counted.
using SlotArguments = std::tuple<py::array, py::array, py::array, py::array, py::array>;

std::shared_ptr<Sampler> make_sampler(const std::vector<CorpusArguments>& arguments,
                                      std::shared_ptr<Schedule> schedule, int64_t dp_rank,
                                      int64_t dp_size, int64_t micro_batch, bool packed,
                                      bool document_masks, bool skip_damaged, bool widen) {
  std::vector<SampledCorpus> corpora;
  for (const auto& [tokens, eod, eod_first, plans] : arguments)
    corpora.push_back({tokens, eod, eod_first, {plans.begin(), plans.end()}});
  return std::make_shared<Sampler>(std::move(corpora), std::move(schedule),
                                   Share{dp_rank, dp_size, micro_batch}, packed, document_masks,
                                   skip_damaged, widen);
}

// The start of an array that must hold at least `needed` items of T in one piece.
template <typename T>
T* memory(py::array& array, int64_t needed) {
  if (needed == 0) return nullptr;
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(array) || array.size() < needed)
    throw std::invalid_argument(text("a buffer has ", array.size(), " items, expected ", needed, " of ",
                                     sizeof(T), " bytes side by side"));
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
  return {memory<uint8_t>(token_bytes, tokens), memory<int64_t>(sample_ids, rows),
          memory<int32_t>(position_ids, sampler.document_masks() ? inputs : 0),
          memory<int32_t>(cu_seqlens, sampler.document_masks() ? starts : 0),
          memory<uint8_t>(counted, sampler.packed() ? inputs : 0)};
}

class PyPrefetcher {
 public:
  PyPrefetcher(const std::shared_ptr<Sampler>& sampler, int64_t consumed,
               std::vector<SlotArguments> slots, int threads)
      : slots_(std::move(slots)) {
    std::vector<Buffers> buffers;
    for (SlotArguments& slot : slots_) buffers.push_back(buffers_of(*sampler, slot));
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

void bind_loader(py::module_& module) {
  py::class_<Sampler, std::shared_ptr<Sampler>>(module, "Sampler")
      .def(py::init(&make_sampler), py::kw_only(), "corpora"_a, "schedule"_a, "dp_rank"_a, "dp_size"_a,
           "micro_batch"_a, "packed"_a, "document_masks"_a, "skip_damaged"_a, "widen"_a);
  py::class_<PyPrefetcher>(module, "Prefetcher")
      .def(py::init<const std::shared_ptr<Sampler>&, int64_t, std::vector<SlotArguments>, int>(),
           "sampler"_a, "consumed"_a, "slots"_a, "threads"_a)
      .def("next", &PyPrefetcher::next)
      .def("close", &PyPrefetcher::close);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Token corpora, sample order, packing and the prefetching loader in C++ (csrc/).";
  bind_corpora(module);
  bind_order(module);
  bind_packing(module);
  bind_loader(module);
}
