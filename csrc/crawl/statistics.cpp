#include "crawl/statistics.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace ingot {
namespace {

// The UTF-8 of a str; UnicodeEncodeError where it has a lone surrogate.
std::string_view utf8(const py::str& text) {
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!bytes) throw py::error_already_set();
  return {bytes, static_cast<size_t>(size)};
}

py::list words(const py::str& text) {
  const std::string_view bytes = utf8(text);
  py::list found;
  for (const Word word : word_bounds(bytes)) found.append(py::str(bytes.data() + word.begin, word.end - word.begin));
  return found;
}

}  // namespace

void bind_statistics(py::module_& module) {
  module.def("words", &words, py::arg("text"), "The words of a text, signs among them, as the rules count them.");
}

}  // namespace ingot
