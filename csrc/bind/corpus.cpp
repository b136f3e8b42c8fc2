// Token files and corpora for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/bind.h"
#include "core/corpus.h"

namespace py = pybind11;
using ingot::Corpus;
using ingot::CorpusSpec;
using ingot::FileCache;
using Starts = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

namespace {

// Ids of four bytes are int32 to Python whatever the file calls them: they lie below 2^31.
py::dtype id_dtype(int item_size) {
  if (item_size == 1) return py::dtype::of<uint8_t>();
  return item_size == 2 ? py::dtype::of<uint16_t>() : py::dtype::of<int32_t>();
}

std::shared_ptr<Corpus> make_corpus(const std::string& format, int item_size,
                                    std::vector<std::string> paths, std::vector<int64_t> tokens,
                                    int64_t vocab_size, std::shared_ptr<FileCache> cache) {
  CorpusSpec spec{ingot::format_named(format), item_size, std::move(paths), std::move(tokens),
                  vocab_size};
  return std::make_shared<Corpus>(std::move(spec), std::move(cache));
}

py::array read_rows(const Corpus& corpus, const Starts& starts, int64_t width) {
  if (starts.ndim() != 1) throw std::invalid_argument("starts must have one dimension");
  if (width < 0 || width > corpus.size())
    throw std::out_of_range("rows of " + std::to_string(width) + " tokens lie outside the " +
                            std::to_string(corpus.size()) + " tokens of the corpus");
  py::array out(id_dtype(corpus.item_size()),
                std::vector<py::ssize_t>{starts.shape(0), static_cast<py::ssize_t>(width)});
  const int64_t* from = starts.data();
  const int64_t rows = starts.shape(0);
  auto* to = static_cast<unsigned char*>(out.mutable_data());
  const py::gil_scoped_release without_gil;
  Corpus::Reader reader(corpus);
  for (int64_t i = 0; i < rows; ++i) reader.will_need(from[i], width);
  for (int64_t i = 0; i < rows; ++i, to += width * corpus.item_size())
    reader.read(from[i], width, to);
  return out;
}

}  // namespace

void bind_corpus(py::module_& module) {
  py::register_exception<ingot::DamagedFile>(module, "DamagedFile", PyExc_RuntimeError);
  py::class_<FileCache, std::shared_ptr<FileCache>>(module, "FileCache")
      .def(py::init<>())  // the limit of open files as it is then, not when the module is loaded
      .def(py::init<size_t>(), py::arg("capacity"))
      .def_property_readonly("opened", &FileCache::opened)
      .def_property_readonly("held", &FileCache::held);
  py::class_<Corpus, std::shared_ptr<Corpus>>(module, "Corpus")
      .def(py::init(&make_corpus), py::kw_only(), py::arg("format"), py::arg("item_size"),
           py::arg("paths"), py::arg("tokens"), py::arg("vocab_size"), py::arg("cache").none(false))
      .def("__len__", &Corpus::size)
      .def("read_rows", &read_rows, py::arg("starts"), py::arg("width"));
}
