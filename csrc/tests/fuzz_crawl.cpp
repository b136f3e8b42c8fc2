// A libFuzzer target over what reads the texts and files of a crawl: html_cost, words, statistics, signatures, clusters.
// `make fuzz` (tests/crawl/test_crawl_fuzz.py) builds it with the sanitizers, and csrc/crawl with it, and runs it.
//
// An input: what is called (1 byte), a number that it is called with (1), then the text, or runs of pairs.
#include <pybind11/embed.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <set>

#include "crawl/words.h"
#include "must.h"

namespace py = pybind11;
using namespace ingot;

namespace ingot {
void bind_html(py::module_& module);
void bind_statistics(py::module_& module);
void bind_signatures(py::module_& module);
}  // namespace ingot

PYBIND11_EMBEDDED_MODULE(_native, module) {  // as csrc/bind_crawl.cpp
  bind_html(module);
  bind_statistics(module);
  bind_signatures(module);
}

namespace {

py::module_ native() {
  static const py::module_ module = [] {
    py::initialize_interpreter(false);
    return py::module_::import("_native");
  }();
  return module;
}

// A page's cost: as many elements as begin at a `<`, unless formatting ones are opened anew in others.
void check_html(std::string_view html) {
  const auto [nodes, visits] =
      native().attr("html_cost")(py::bytes(html.data(), html.size())).cast<std::pair<uint64_t, uint64_t>>();
  const auto tags = static_cast<uint64_t>(std::count(html.begin(), html.end(), '<'));
  MUST(nodes <= tags * (tags + 1) / 2 && nodes <= visits * (tags + 1));
}

// Words lie in order, hold no space, and leave nothing but spaces out: of any bytes.
void check_words(std::string_view text) {
  size_t at = 0;
  const auto spaces_until = [&](size_t end) {
    while (at < end) MUST(kind_of(decode(text, at)) & kSpace);
    MUST(at == end);
  };
  for (const Word word : word_bounds(text)) {
    spaces_until(word.begin);
    MUST(at < word.end && word.end <= text.size());
    while (at < word.end) MUST(!(kind_of(decode(text, at)) & kSpace));
    MUST(at == word.end);
  }
  spaces_until(text.size());
}

py::str text_of(std::string_view bytes) {
  PyObject* text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace");
  MUST(text != nullptr);
  return py::reinterpret_steal<py::str>(text);
}

// Counts of a text agree with each other and with Python's, and the same words give the same again.
void check_statistics(std::string_view bytes, size_t number) {
  const py::str text = text_of(bytes);
  const py::list words = native().attr("words")(text), lines = text.attr("splitlines")();
  const std::vector<std::string> stop_words{"the", "a", "the"};
  const auto call = native().attr("statistics");
  const py::tuple found = call(text, py::none(), stop_words, number, true);
  MUST(found.equal(call(text, words, stop_words, number, true)));
  const auto counts = found[0].cast<std::vector<size_t>>(), repeated = found[1].cast<std::vector<size_t>>();
  MUST(counts.size() == 22 && repeated.size() == 9);
  MUST(counts[0] == py::len(text) && counts[4] == py::len(words) && counts[9] == py::len(lines));
  MUST(counts[5] <= counts[4] && counts[6] <= counts[0] && counts[7] <= counts[4] && counts[8] <= 3);
  MUST(counts[10] + counts[11] <= 2 * counts[9] && counts[12] <= counts[1] + 1 && counts[13] <= counts[12]);
  for (size_t i = 3; i < repeated.size(); ++i) MUST(repeated[i] <= counts[0]);  // n-grams from 5 on: each once
  MUST(native().attr("sentences")(text).cast<size_t>() <= counts[4] + 1);
  const size_t n = 1 + number % 20;
  const py::array_t<uint64_t> grams = native().attr("ngrams")(text, n);
  MUST(static_cast<size_t>(grams.size()) <= counts[4] && (grams.size() == 0 || counts[4] >= n));
}

// A signature depends on the text alone; the order and the case of what else is signed change nothing.
void check_signatures(std::string_view bytes, size_t number) {
  const size_t bands = 1 + number % 7, rows = 1 + number / 32;
  const py::object signer = native().attr("Signer")(1 + number % 5, bands, rows);
  const py::str text = text_of(bytes);
  const auto sign = [&](const py::list& texts) { return py::array_t<uint64_t>(signer.attr("sign")(texts)); };
  py::list two;
  two.append(py::str("before"));
  two.append(text);
  py::list one;
  one.append(text);
  const auto alone = sign(one), among = sign(two);
  MUST(alone.ndim() == 2 && alone.shape(1) == static_cast<py::ssize_t>(2 + bands) && among.shape(0) == 2);
  for (py::ssize_t i = 0; i < alone.shape(1); ++i) MUST(alone.at(0, i) == among.at(1, i));
  MUST(py::array_t<uint64_t>(signer.attr("shingles")(text)).size() >= 1);
}

// Runs of pairs are joined as a plain union does it, or refused: out of order, or of a document that there is not.
void check_clusters(std::string_view bytes, size_t number) {
  const py::ssize_t documents = 1 + static_cast<py::ssize_t>(number % 16), runs = 1 + static_cast<py::ssize_t>(number / 64);
  const size_t pairs = bytes.size() / 2, each = (pairs + runs - 1) / static_cast<size_t>(runs);
  std::string packed;
  std::map<uint64_t, std::set<uint32_t>> expected;
  bool in_order = true, known = true;
  py::list given, kept;  // runs, and the bytes that they are views of
  for (size_t first = 0; first < pairs; first += each) {
    packed.clear();
    uint64_t last = 0;
    for (size_t i = first; i < std::min(pairs, first + each); ++i) {
      const uint64_t hash = static_cast<uint8_t>(bytes[2 * i]);
      const uint32_t document = static_cast<uint8_t>(bytes[2 * i + 1]) % 20;
      packed.append(reinterpret_cast<const char*>(&hash), 8).append(reinterpret_cast<const char*>(&document), 4);
      in_order = in_order && hash >= last, last = hash;
      known = known && document < documents;
      expected[hash].insert(document);
    }
    py::list run;
    const py::bytes copy(packed);
    kept.append(copy);
    for (const size_t count : {packed.size() / 12, size_t{0}})  // an array without pairs ends no run
      run.append(py::memoryview::from_buffer(static_cast<const void*>(PyBytes_AS_STRING(copy.ptr())), 12, "12s",
                                             {static_cast<py::ssize_t>(count)}, {py::ssize_t{12}}));
    given.append(run);
  }
  py::array_t<uint32_t> forest(documents);
  std::vector<uint32_t> roots(static_cast<size_t>(documents));
  for (size_t i = 0; i < roots.size(); ++i) forest.mutable_at(static_cast<py::ssize_t>(i)) = roots[i] = static_cast<uint32_t>(i);
  try {
    native().attr("join")(given, forest);
    MUST(in_order && known);
  } catch (py::error_already_set& error) {
    MUST(error.matches(PyExc_ValueError) ? !in_order : error.matches(PyExc_IndexError) && !known);
    return;
  }
  const py::array_t<uint32_t> sizes = native().attr("flatten")(forest);
  for (bool changed = true; changed;) {
    changed = false;
    for (const auto& [hash, group] : expected) {
      uint32_t least = roots[*group.begin()];
      for (const uint32_t one : group) least = std::min(least, roots[one]);
      for (const uint32_t one : group) changed |= roots[one] != least, roots[one] = least;
    }
  }
  std::vector<uint32_t> counted(roots.size());
  for (size_t i = 0; i < roots.size(); ++i) {
    MUST(forest.at(static_cast<py::ssize_t>(i)) == roots[i]);
    ++counted[roots[i]];
  }
  for (size_t i = 0; i < roots.size(); ++i) MUST(sizes.at(static_cast<py::ssize_t>(i)) == counted[i]);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  native();
  // In memory of its own, so that the sanitizer sees a read behind its end.
  const std::vector<char> copy(data + 2, data + size);
  const std::string_view bytes(copy.data(), copy.size());
  switch (data[0] % 5) {
    case 0: check_html(bytes); break;
    case 1: check_words(bytes); break;
    case 2: check_statistics(bytes, data[1]); break;
    case 3: check_signatures(bytes, data[1]); break;
    case 4: check_clusters(bytes, data[1]); break;
  }
  return 0;
}
