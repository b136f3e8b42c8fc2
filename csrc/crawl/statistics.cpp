#include <pybind11/pybind11.h>

namespace ingot {

void bind_statistics(pybind11::module_& module) { (void)module; }

}  // namespace ingot
