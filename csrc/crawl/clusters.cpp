// Finds documents that share a hash, by merging sorted runs of (hash, document) on disk, and joins them to clusters.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <tuple>

namespace py = pybind11;
using namespace pybind11::literals;

namespace ingot {
namespace {

#pragma pack(push, 1)
struct Pair {  // as on disk, little-endian
  uint64_t hash;
  uint32_t document;
};
#pragma pack(pop)

// Pairs in a file, ascending by their hash: path, bytes before the first, pairs, what is added to each document.
using Run = std::tuple<std::string, uint64_t, uint64_t, uint32_t>;

// What cannot be read or written: OSError to Python.
struct FileError {
  int code;
  std::string path;
};

class File {
 public:
  File(const std::string& path, const char* mode) : path_(path), file_(std::fopen(path.c_str(), mode), &std::fclose) {
    check(file_ != nullptr);
    std::setvbuf(file_.get(), nullptr, _IONBF, 0);  // the callers have buffers of their own
  }
  void seek(uint64_t offset) { check(!fseeko(file_.get(), static_cast<off_t>(offset), SEEK_SET)); }
  void read(Pair* to, size_t count) { check(std::fread(to, sizeof(Pair), count, file_.get()) == count); }
  void write(const Pair* from, size_t count) { check(std::fwrite(from, sizeof(Pair), count, file_.get()) == count); }
  void check(bool fine) const {
    if (!fine) throw FileError{file_ && std::feof(file_.get()) ? EIO : errno, path_};
  }

 private:
  std::string path_;
  std::unique_ptr<FILE, int (*)(FILE*)> file_;
};

// The pairs of a run one after another, from a buffer of so many bytes.
class Reader {
 public:
  Reader(const Run& run, size_t buffer)
      : file_(std::get<0>(run), "rb"), left_(std::get<2>(run)), base_(std::get<3>(run)),
        pairs_(std::min<uint64_t>(left_, std::max<size_t>(1, buffer / sizeof(Pair)))) {
    file_.seek(std::get<1>(run));
  }

  // Whether there is another, which is `pair` then.
  bool next() {
    if (at_ == end_) {
      if (!left_) return false;
      at_ = 0, end_ = std::min<uint64_t>(left_, pairs_.size());
      file_.read(pairs_.data(), end_);
      left_ -= end_;
    }
    if (pairs_[at_].hash < pair.hash) throw std::runtime_error("a run is not in order");
    pair = pairs_[at_++];
    pair.document += base_;
    return true;
  }

  Pair pair{};

 private:
  File file_;
  uint64_t left_;
  uint32_t base_;
  std::vector<Pair> pairs_;
  size_t at_ = 0, end_ = 0;
};

// Calls `each` with the pairs of all runs, ascending by hash.
template <typename Each>
void for_each_merged(const std::vector<Run>& runs, size_t buffer, Each each) {
  using Entry = std::pair<uint64_t, Reader*>;
  const auto later = [](const Entry& a, const Entry& b) { return a.first < b.first; };
  std::vector<std::unique_ptr<Reader>> readers;
  std::vector<Entry> heap;  // the smallest hash at 0, the children of i at 2i + 1 and 2i + 2
  for (const Run& run : runs) {
    readers.push_back(std::make_unique<Reader>(run, buffer));
    if (readers.back()->next()) heap.emplace_back(readers.back()->pair.hash, readers.back().get());
  }
  std::sort(heap.begin(), heap.end(), later);
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
      child += child + 1 < heap.size() && later(heap[child + 1], heap[child]);
      if (!later(heap[child], top)) break;
      heap[at] = heap[child];
    }
    heap[at] = top;
  }
}

void merge_runs(const std::vector<Run>& runs, size_t buffer, const std::string& path) {
  File file(path, "wbx");
  std::vector<Pair> pairs;
  const size_t capacity = std::max<size_t>(1, buffer / sizeof(Pair));
  pairs.reserve(capacity);
  for_each_merged(runs, buffer, [&](const Pair& pair) {
    pairs.push_back(pair);
    if (pairs.size() == capacity) file.write(pairs.data(), pairs.size()), pairs.clear();
  });
  file.write(pairs.data(), pairs.size());
}

// Of each document another of its cluster that is smaller; the smallest has itself.
using Forest = py::array_t<uint32_t, py::array::c_style>;

uint32_t root(uint32_t* parents, uint32_t document) {
  while (parents[document] != document) document = parents[document] = parents[parents[document]];
  return document;
}

void join_runs(const std::vector<Run>& runs, size_t buffer, Forest forest) {
  uint32_t* parents = forest.mutable_data();
  const auto size = static_cast<uint64_t>(forest.size());
  const py::gil_scoped_release without_gil;
  Pair last{};
  bool first = true;
  for_each_merged(runs, buffer, [&](const Pair& pair) {
    if (pair.document >= size) throw std::runtime_error("a run has a document that there is not");
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
  const py::ssize_t size = forest.size();
  const py::gil_scoped_release without_gil;
  std::fill(sizes, sizes + size, 0);
  // A parent is smaller than its child, and has its root by then.
  for (py::ssize_t i = 0; i < size; ++i) ++sizes[parents[i] = parents[parents[i]]];
  return counted;
}

}  // namespace

void bind_clusters(py::module_& module) {
  py::register_local_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const FileError& error) {
      errno = error.code;
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
    }
  });
  module.def("merge_runs", &merge_runs, py::call_guard<py::gil_scoped_release>(), "runs"_a, "buffer"_a, "path"_a,
             "Write the pairs of runs (path, offset, pairs, base) by their hashes to a new file. Raises OSError.");
  module.def("join_runs", &join_runs, "runs"_a, "buffer"_a, py::arg("forest").noconvert(),
             "Join the documents that have a hash in common, `buffer` bytes for each run. Raises OSError.");
  module.def("flatten", &flatten, py::arg("forest").noconvert(),
             "Let every document have the smallest of its cluster; the clusters' sizes, at their smallest.");
}

}  // namespace ingot
