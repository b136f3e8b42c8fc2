// Documents and packing: arrays in and out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "bind/bind.h"
#include "core/documents.h"
#include "core/packing.h"

namespace py = pybind11;
using ingot::PackPlan;
using ingot::Piece;
using PieceArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

namespace {

std::vector<Piece> to_pieces(const PieceArray& array) {
  if (array.ndim() != 2 || array.shape(1) != 2)
    throw std::invalid_argument("expected pieces [n, 2] of first token and tokens");
  const auto* values = array.data();
  std::vector<Piece> pieces(static_cast<size_t>(array.shape(0)));
  for (size_t i = 0; i < pieces.size(); ++i) pieces[i] = {values[2 * i], values[2 * i + 1]};
  return pieces;
}

PieceArray from_pieces(const Piece* first, size_t count) {
  PieceArray out({static_cast<py::ssize_t>(count), py::ssize_t{2}});
  int64_t* to = out.mutable_data();
  for (size_t i = 0; i < count; ++i) {
    to[2 * i] = first[i].start;
    to[2 * i + 1] = first[i].tokens;
  }
  return out;
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple scan_documents(const py::array& tokens, uint32_t eod, bool eod_first) {
  const py::array rows = py::array::ensure(tokens, py::array::c_style);
  if (!rows || rows.ndim() != 2 || rows.shape(1) < 2 ||
      (rows.dtype().kind() != 'u' && rows.dtype().kind() != 'i'))
    throw std::invalid_argument("expected token ids [B, T + 1], T >= 1");
  const int64_t B = rows.shape(0), T = rows.shape(1) - 1;
  if (B > 0 && T > std::numeric_limits<int32_t>::max() / B)
    throw std::invalid_argument("more than 2^31 - 1 tokens");
  py::array_t<int32_t> position_ids({B, T});
  std::vector<int32_t> starts(static_cast<size_t>(B * T + 1));
  int64_t count = 0;
  for (int64_t row = 0; row < B; ++row)
    count += ingot::scan_documents(rows.data(row), static_cast<int>(rows.itemsize()), T, eod,
                                   eod_first, static_cast<int32_t>(row * T),
                                   position_ids.mutable_data(row), starts.data() + count);
  starts[static_cast<size_t>(count)] = static_cast<int32_t>(B * T);
  starts.resize(static_cast<size_t>(count) + 1);
  return py::make_tuple(position_ids, to_array(starts));
}

py::tuple lay_out_pieces(const PieceArray& pieces, int64_t seq_len) {
  if (seq_len < 1 || seq_len > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("seq_len must be at least 1 and below 2^31");
  const std::vector<Piece> row = to_pieces(pieces);
  py::array_t<int32_t> position_ids(seq_len);
  py::array_t<uint8_t> counted(seq_len);
  std::vector<int32_t> starts(static_cast<size_t>(seq_len));
  const int64_t count =
      ingot::lay_out_pieces(row.data(), static_cast<int64_t>(row.size()), seq_len, 0,
                            position_ids.mutable_data(), starts.data(), counted.mutable_data());
  starts.resize(static_cast<size_t>(count));
  starts.push_back(static_cast<int32_t>(seq_len));
  return py::make_tuple(position_ids, to_array(starts), counted);
}

py::tuple plan_window(const PieceArray& documents, int64_t seq_len) {
  const std::vector<Piece> given = to_pieces(documents);
  ingot::PackedRows rows;
  {
    const py::gil_scoped_release without_gil;
    rows = ingot::plan_window(given, seq_len);
  }
  return py::make_tuple(from_pieces(rows.pieces.data(), rows.pieces.size()),
                        to_array(rows.row_ends));
}

}  // namespace

void bind_packing(py::module_& module) {
  module.def("scan_documents", &scan_documents, py::arg("tokens"), py::arg("eod_id"),
             py::arg("eod_first"));
  module.def("lay_out_pieces", &lay_out_pieces, py::arg("pieces"), py::arg("seq_len"));
  module.def("plan_window", &plan_window, py::arg("documents"), py::arg("seq_len"));
  py::class_<PackPlan, std::shared_ptr<PackPlan>>(module, "PackPlan")
      .def(py::init<const std::string&, int64_t, int64_t>(), py::arg("path"), py::arg("seq_len"),
           py::arg("corpus_tokens"))
      .def("__len__", &PackPlan::rows)
      .def("pieces",
           [](const PackPlan& plan, int64_t row) {
             const auto pieces = plan.pieces(row);
             return from_pieces(pieces.begin(), pieces.size());
           },
           py::arg("row"))
      .def("targets", &PackPlan::targets, py::arg("row"))
      .def("check_not_truncated", &PackPlan::check_not_truncated);
}
