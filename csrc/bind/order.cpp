// Sample order, blends and schedules for Python: numbers in, arrays out.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "core/blend.h"
#include "core/order.h"
#include "core/schedule.h"

namespace py = pybind11;
using ingot::BlendTable;
using ingot::Place;
using ingot::Schedule;
using ingot::SchedulePhase;
using ingot::Source;

namespace {

py::ssize_t checked(int64_t count) {
  if (count < 0) throw std::invalid_argument("count must not be negative");
  return static_cast<py::ssize_t>(count);
}

py::array_t<int64_t> positions(uint64_t seed, uint64_t n_samples, uint64_t first, int64_t count) {
  const ingot::SampleOrder order(seed, n_samples);
  py::array_t<int64_t> out(checked(count));
  int64_t* to = out.mutable_data();
  const py::gil_scoped_release without_gil;
  order.positions(first, count, to);
  return out;
}

py::tuple entries(const BlendTable& table, uint64_t first, int64_t count) {
  py::array_t<int32_t> sources(checked(count));
  py::array_t<int64_t> ordinals(checked(count));
  for (py::ssize_t i = 0; i < count; ++i) {
    const BlendTable::Entry entry = table.at(first + static_cast<uint64_t>(i));
    sources.mutable_at(i) = static_cast<int32_t>(entry.source);
    ordinals.mutable_at(i) = static_cast<int64_t>(entry.ordinal);
  }
  return py::make_tuple(sources, ordinals);
}

// Reads llm.data.samples.schedule.SchedulePhase.
SchedulePhase phase_of(const py::handle& phase) {
  SchedulePhase out{phase.attr("first_sample").cast<int64_t>(),
                    phase.attr("global_batch").cast<int64_t>(),
                    phase.attr("seq_len").cast<int64_t>(),
                    {},
                    phase.attr("shares").cast<std::vector<uint32_t>>()};
  for (const py::handle source : phase.attr("sources"))
    out.sources.push_back({source.attr("corpus").cast<int>(),
                           source.attr("n_samples").cast<uint64_t>(),
                           source.attr("first_ordinal").cast<uint64_t>()});
  return out;
}

std::shared_ptr<Schedule> make_schedule(uint64_t seed, const py::iterable& phases) {
  std::vector<SchedulePhase> out;
  for (const py::handle phase : phases) out.push_back(phase_of(phase));
  return std::make_shared<Schedule>(seed, std::move(out));
}

py::tuple places(const Schedule& schedule, int64_t first, int64_t count) {
  std::vector<Place> found(static_cast<size_t>(checked(count)));
  {
    const py::gil_scoped_release without_gil;
    schedule.places(first, count, found.data());
  }
  py::array_t<int32_t> corpora(checked(count));
  py::array_t<int64_t> at(checked(count)), epochs(checked(count));
  for (py::ssize_t i = 0; i < count; ++i) {
    const Place& place = found[static_cast<size_t>(i)];
    corpora.mutable_at(i) = place.corpus;
    at.mutable_at(i) = place.position;
    epochs.mutable_at(i) = static_cast<int64_t>(place.epoch);
  }
  return py::make_tuple(corpora, at, epochs);
}

int64_t after(const Schedule& schedule, int corpus, int64_t position, uint64_t epoch,
              size_t phase) {
  return schedule.after({corpus, position, epoch}, phase).position;
}

}  // namespace

void bind_order(py::module_& module) {
  module.def("positions", &positions, py::arg("seed"), py::arg("n_samples"), py::arg("first"),
             py::arg("count"));
  py::class_<BlendTable>(module, "BlendTable")
      .def(py::init<const std::vector<uint32_t>&>(), py::arg("shares"))
      .def("entries", &entries, py::arg("first"), py::arg("count"))
      .def("count", &BlendTable::count, py::arg("source"), py::arg("n"));
  py::class_<Schedule, std::shared_ptr<Schedule>>(module, "Schedule")
      .def(py::init(&make_schedule), py::arg("seed"), py::arg("phases"))
      .def("phase_index", &Schedule::phase_index, py::arg("sample"))
      .def("places", &places, py::arg("first"), py::arg("count"))
      .def("after", &after, py::arg("corpus"), py::arg("position"), py::arg("epoch"),
           py::arg("phase"));
}
