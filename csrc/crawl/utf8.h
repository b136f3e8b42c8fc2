// The text of a Python str.
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>

namespace ingot {

// Its UTF-8, which lives as long as the str; UnicodeEncodeError where it has a lone surrogate.
inline std::string_view utf8(pybind11::handle text) {
  Py_ssize_t size = 0;
  const char* bytes = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!bytes) throw pybind11::error_already_set();
  return {bytes, static_cast<size_t>(size)};
}

}  // namespace ingot
