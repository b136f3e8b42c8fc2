// The extension llm.crawl._native: what is computed of every word of a corpus. Each part binds its own functions.
#include <pybind11/pybind11.h>

namespace ingot {
void bind_html(pybind11::module_& module);
void bind_statistics(pybind11::module_& module);
void bind_signatures(pybind11::module_& module);
}  // namespace ingot

PYBIND11_MODULE(_native, module) {
  ingot::bind_html(module);
  ingot::bind_statistics(module);
  ingot::bind_signatures(module);
}
