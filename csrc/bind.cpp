// Python module llm.data._native: arrays in and out; the work itself runs without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bind/bind.h"
#include "core/order.h"
#include "core/prefetcher.h"
#include "core/token_store.h"

namespace py = pybind11;
using ingot::Batch;
using ingot::Plan;
using ingot::Prefetcher;
using ingot::TokenStore;
using Indices = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

namespace {

// How long a wait for a batch goes without looking at signals (Ctrl-C).
constexpr std::chrono::milliseconds kPatience{100};

py::dtype token_dtype(int item_size) {
  return item_size == 2 ? py::dtype::of<uint16_t>() : py::dtype::of<int32_t>();
}

// An array over memory that it owns: the batch is not copied, and lives as long as any view of it.
template <typename T>
py::array owning_array(const py::dtype& dtype, std::vector<py::ssize_t> shape,
                       std::unique_ptr<T[]> data) {
  const py::capsule owner(data.get(), [](void* memory) { delete[] static_cast<T*>(memory); });
  T* memory = data.release();
  return py::array(dtype, std::move(shape), memory, owner);
}

py::array read_rows(const TokenStore& store, const Indices& starts, int64_t width) {
  if (starts.ndim() != 1) throw std::invalid_argument("starts must have one dimension");
  if (width < 0 || width > store.size())
    throw std::out_of_range("rows of " + std::to_string(width) + " tokens from a file of " +
                            std::to_string(store.size()));
  py::array out(token_dtype(store.item_size()),
                std::vector<py::ssize_t>{starts.shape(0), static_cast<py::ssize_t>(width)});
  const int64_t* from = starts.data();
  const int64_t rows = starts.shape(0);
  void* to = out.mutable_data();
  const py::gil_scoped_release without_gil;
  ingot::gather_rows(store, from, rows, width, to);
  return out;
}

py::array_t<int64_t> positions(uint64_t seed, uint64_t n_samples, uint64_t first, int64_t count) {
  if (count < 0) throw std::invalid_argument("count must not be negative");
  const ingot::SampleOrder order(seed, n_samples);
  py::array_t<int64_t> out(static_cast<py::ssize_t>(count));
  int64_t* to = out.mutable_data();
  const py::gil_scoped_release without_gil;
  order.positions(first, count, to);
  return out;
}

class PyPrefetcher {
 public:
  PyPrefetcher(std::shared_ptr<TokenStore> store, int64_t seq_len, uint64_t seed, int64_t first,
               int64_t stride, int64_t rows, int depth, int threads)
      : item_size_(store->item_size()),
        prefetcher_(std::move(store), Plan{seq_len, seed, first, stride, rows}, depth, threads),
        rows_(rows),
        width_(seq_len + 1) {}  // after the prefetcher, which refuses a seq_len that overflows

  py::tuple next() {
    std::optional<Batch> batch;
    while (!batch) {
      {
        const py::gil_scoped_release without_gil;
        batch = prefetcher_.next(kPatience);
      }
      if (!batch && PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
    py::array tokens =
        owning_array(token_dtype(item_size_), {rows_, width_}, std::move(batch->tokens));
    py::array ids = owning_array(py::dtype::of<int64_t>(), {rows_}, std::move(batch->sample_ids));
    return py::make_tuple(tokens, ids);
  }

  void close() {
    const py::gil_scoped_release without_gil;
    prefetcher_.close();
  }

 private:
  int item_size_;
  Prefetcher prefetcher_;
  int64_t rows_, width_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Token store, sample order and prefetching loader in C++ (csrc/).";
  bind_corpus(module);
  py::class_<TokenStore, std::shared_ptr<TokenStore>>(module, "TokenStore")
      .def(py::init<const std::string&, int, int64_t>(), py::arg("path"), py::arg("item_size"),
           py::arg("n_tokens"))
      .def("__len__", &TokenStore::size)
      .def("read_rows", &read_rows, py::arg("starts"), py::arg("width"));
  module.def("positions", &positions, py::arg("seed"), py::arg("n_samples"), py::arg("first"),
             py::arg("count"));
  py::class_<PyPrefetcher>(module, "Prefetcher")
      .def(py::init<std::shared_ptr<TokenStore>, int64_t, uint64_t, int64_t, int64_t, int64_t, int,
                    int>(),
           py::arg("store"), py::arg("seq_len"), py::arg("seed"), py::arg("first"),
           py::arg("stride"), py::arg("rows"), py::arg("depth"), py::arg("threads"))
      .def("next", &PyPrefetcher::next)
      .def("close", &PyPrefetcher::close);
  bind_packing(module);
}
