// Finds documents that share a hash, by merging runs of pairs (hash, document), and joins them to clusters.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <deque>

namespace py = pybind11;
using namespace pybind11::literals;

namespace ingot {
namespace {

#pragma pack(push, 1)
struct Pair {  // as in files, little-endian
  uint64_t hash;
  uint32_t document;
};
#pragma pack(pop)

// The pairs of a run one after another, from an iterator of arrays.
class Reader {
 public:
  explicit Reader(py::handle arrays) : arrays_(py::iter(arrays)) {}

  // Whether there is another, which is `pair` then.
  bool next() {
    while (at_ == end_) {
      array_ = {};
      const auto array = py::reinterpret_steal<py::buffer>(PyIter_Next(arrays_.ptr()));
      if (PyErr_Occurred()) throw py::error_already_set();
      if (!array) return false;
      array_ = array.request();
      if (array_.itemsize != sizeof(Pair)) throw py::type_error("pairs of 12 bytes are needed");
      at_ = static_cast<const Pair*>(array_.ptr), end_ = at_ + array_.size;
    }
    if (at_->hash < pair.hash) throw py::value_error("a run is not in order");
    pair = *at_++;
    return true;
  }

  Pair pair{};

 private:
  py::iterator arrays_;
  py::buffer_info array_;
  const Pair *at_ = nullptr, *end_ = nullptr;
};

// Calls `each` with the pairs of all runs, ascending by hash.
template <typename Each>
void for_each_merged(const py::list& runs, Each each) {
  using Entry = std::pair<uint64_t, Reader*>;
  const auto less = [](const Entry& a, const Entry& b) { return a.first < b.first; };
  std::deque<Reader> readers;
  std::vector<Entry> heap;  // the smallest hash at 0, the children of i at 2i + 1 and 2i + 2
  for (const py::handle run : runs)
    if (readers.emplace_back(run).next()) heap.emplace_back(readers.back().pair.hash, &readers.back());
  std::sort(heap.begin(), heap.end(), less);
  while (!heap.empty()) {
    Entry top = heap[0];
    each(top.second->pair);
    if (top.second->next()) {
      top.first = top.second->pair.hash;
    } else {
      top = heap.back();
      heap.pop_back();
      if (heap.empty()) return;
    }
    size_t at = 0;  // where `top` sinks to
    for (size_t child; (child = 2 * at + 1) < heap.size(); at = child) {
      child += child + 1 < heap.size() && less(heap[child + 1], heap[child]);
      if (!less(heap[child], top)) break;
      heap[at] = heap[child];
    }
    heap[at] = top;
  }
}

void merge(const py::list& runs, size_t count, const py::function& write) {
  std::vector<Pair> pairs;
  const auto flush = [&] {
    if (!pairs.empty()) write(py::memoryview::from_memory(pairs.data(), pairs.size() * sizeof(Pair)));
    pairs.clear();
  };
  pairs.reserve(count);
  for_each_merged(runs, [&](const Pair& pair) {
    pairs.push_back(pair);
    if (pairs.size() == count) flush();
  });
  flush();
}

// Of each document another of its cluster that is smaller; the smallest has itself.
using Forest = py::array_t<uint32_t, py::array::c_style>;

uint32_t root(uint32_t* parents, uint32_t document) {
  while (parents[document] != document) document = parents[document] = parents[parents[document]];
  return document;
}

void join(const py::list& runs, Forest forest) {
  uint32_t* parents = forest.mutable_data();
  Pair last{};
  bool first = true;
  for_each_merged(runs, [&](const Pair& pair) {
    if (pair.document >= forest.size()) throw py::index_error("a run has a document that there is not");
    if (!first && pair.hash == last.hash) {
      const uint32_t one = root(parents, last.document), other = root(parents, pair.document);
      parents[std::max(one, other)] = std::min(one, other);
    }
    last = pair, first = false;
  });
}

Forest flatten(Forest forest) {
  Forest counted(forest.size());
  uint32_t *parents = forest.mutable_data(), *sizes = counted.mutable_data();
  std::fill(sizes, sizes + forest.size(), 0);
  // A parent is smaller than its child, and has its root by then.
  for (py::ssize_t i = 0; i < forest.size(); ++i) ++sizes[parents[i] = parents[parents[i]]];
  return counted;
}

}  // namespace

void bind_clusters(py::module_& module) {
  module.def("merge", &merge, "runs"_a, "count"_a, "write"_a,
             "Pass the pairs of runs, iterators of arrays, to `write` as bytes, by hash, so many at a time.");
  module.def("join", &join, "runs"_a, py::arg("forest").noconvert(),
             "Join the documents that have a hash in common. Raises IndexError, ValueError where a run makes no sense.");
  module.def("flatten", &flatten, py::arg("forest").noconvert(),
             "Let every document have the smallest of its cluster; the clusters' sizes, at their smallest.");
}

}  // namespace ingot
