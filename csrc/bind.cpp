// Python module llm.data._native: arrays in and out; the work itself runs without the GIL.
#include "bind/bind.h"

PYBIND11_MODULE(_native, module) {
  module.doc() = "Token corpora, sample order, packing and the prefetching loader in C++ (csrc/).";
  bind_corpus(module);
  bind_order(module);
  bind_packing(module);
  bind_loader(module);
}
