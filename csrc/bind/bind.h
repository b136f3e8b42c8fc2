// The parts of the Python module llm.data._native, one file each.
#pragma once

#include <pybind11/pybind11.h>

void bind_corpus(pybind11::module_& module);
void bind_order(pybind11::module_& module);
void bind_packing(pybind11::module_& module);
void bind_loader(pybind11::module_& module);
