// What says of two texts that they are the same, or nearly so: hashes of their words, and MinHash of their shingles.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/clones.h"
#include "crawl/utf8.h"
#include "crawl/words.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace ingot {
namespace {

constexpr size_t kBlock = 16;  // permutations whose minima stay in registers
constexpr uint32_t kMost = std::numeric_limits<uint32_t>::max();

// Spreads a number over 64 bits, one to one: the last step of SplitMix64.
uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// The hash of bytes, read eight at a time.
uint64_t hash_of(std::string_view bytes) {
  uint64_t hash = bytes.size();
  for (size_t at = 0; at < bytes.size(); at += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
    hash = mixed(hash ^ eight);
  }
  return hash;
}

// Whether a script has no spaces between words: Thai, Lao, Burmese, Khmer, Chinese and Japanese.
bool without_spaces(char32_t point) {
  const auto between = [point](char32_t first, char32_t last) { return first <= point && point <= last; };
  return between(0x0E00, 0x0EFF) || between(0x1000, 0x109F) || between(0x1780, 0x17FF) || between(0x2E80, 0x2FDF) ||
         between(0x3041, 0xA4CF) || between(0xF900, 0xFAFF) || between(0x20000, 0x3FFFF);
}

// The hashes of a text's words, in order and without signs. Where words are written without spaces each character is
// one. A text that has none is a word as a whole.
std::vector<uint64_t> word_hashes(std::string_view text) {
  std::vector<uint64_t> hashes;
  const auto add = [&](size_t begin, size_t end) { hashes.push_back(hash_of(text.substr(begin, end - begin))); };
  for (const Word word : word_bounds(text)) {
    size_t begin = word.begin;
    bool wordlike = false;
    for (size_t at = begin; at < word.end;) {
      const size_t here = at;
      const char32_t point = text[at] & 0x80 ? decode(text, at) : static_cast<char32_t>(text[at++]);
      if (without_spaces(point)) {
        if (wordlike) add(begin, here);
        add(here, at);
        begin = at, wordlike = false;
      } else {
        wordlike = wordlike || kind_of(point) & (kLetter | kDigit);
      }
    }
    if (wordlike) add(begin, word.end);
  }
  if (hashes.empty()) hashes.push_back(hash_of(text));
  return hashes;
}

// The hashes of each `size` consecutive words, or one of all of them where there are fewer.
std::vector<uint64_t> shingles_of(const std::vector<uint64_t>& words, size_t size) {
  size = std::min(size, words.size());
  std::vector<uint64_t> hashes(words.size() - size + 1);
  for (size_t i = 0; i < hashes.size(); ++i) {
    uint64_t sum = 0;
    for (size_t k = 0; k < size; ++k) sum = sum * 0x9E3779B97F4A7C15u + words[i + k];
    hashes[i] = mixed(sum);
  }
  return hashes;
}

INGOT_VECTOR_CLONES
void find_minima(const std::vector<uint32_t>& shingles, const std::vector<uint32_t>& factors,
                 const std::vector<uint32_t>& terms, std::vector<uint32_t>& minima) {
  for (size_t first = 0; first < minima.size(); first += kBlock) {
    uint32_t least[kBlock], factor[kBlock], term[kBlock];
    std::memcpy(factor, &factors[first], sizeof factor);
    std::memcpy(term, &terms[first], sizeof term);
    std::fill(least, least + kBlock, kMost);
    for (const uint32_t shingle : shingles)
      for (size_t k = 0; k < kBlock; ++k) least[k] = std::min(least[k], shingle * factor[k] + term[k]);
    std::memcpy(&minima[first], least, sizeof least);
  }
}

class Signer {
 public:
  Signer(size_t words, size_t bands, size_t rows) : words_(words), bands_(bands), rows_(rows) {
    for (size_t i = 0; i < (bands * rows + kBlock - 1) / kBlock * kBlock; ++i) {
      const uint64_t random = mixed(i + 1);
      factors_.push_back(static_cast<uint32_t>(random) | 1);  // odd: one to one
      terms_.push_back(static_cast<uint32_t>(random >> 32));
    }
  }

  py::array_t<uint64_t> sign(const py::list& texts) const {
    std::vector<std::string_view> views;
    for (const py::handle text : texts) views.push_back(utf8(text));
    py::array_t<uint64_t> signatures({views.size(), 2 + bands_});
    uint64_t* to = signatures.mutable_data();
    const py::gil_scoped_release without_gil;
    for (const std::string_view view : views) sign(view, to), to += 2 + bands_;
    return signatures;
  }

  py::array_t<uint64_t> shingles(const py::str& text) const {
    const std::vector<uint64_t> hashes = shingles_of(word_hashes(utf8(text)), words_);
    return py::array_t<uint64_t>(static_cast<py::ssize_t>(hashes.size()), hashes.data());
  }

 private:
  void sign(std::string_view text, uint64_t* signature) const {
    const std::vector<uint64_t> words = word_hashes(text), shingles = shingles_of(words, words_);
    std::vector<uint32_t> upper(shingles.size()), minima(factors_.size());
    // The permutations see the upper half of a hash and the witness the lower one: they are independent.
    uint32_t witness = kMost;
    for (size_t i = 0; i < shingles.size(); ++i) {
      upper[i] = static_cast<uint32_t>(shingles[i] >> 32);
      witness = std::min(witness, static_cast<uint32_t>(shingles[i]));
    }
    find_minima(upper, factors_, terms_, minima);
    *signature++ = mixed(uint64_t{witness} + 1);  // a long text's minimum is small: spread, it tells no length
    uint64_t& all = *signature++ = 0;
    for (const uint64_t word : words) all = mixed(all ^ word);
    for (size_t i = 0; i < bands_; ++i) {
      uint64_t& band = *signature++ = 0;
      for (size_t row = 0; row < rows_; ++row) band = mixed(band ^ (minima[i * rows_ + row] + uint64_t{1}));
    }
  }

  size_t words_, bands_, rows_;
  std::vector<uint32_t> factors_, terms_;  // of the permutations x -> factor * x + term mod 2^32
};

}  // namespace

void bind_clusters(py::module_& module);

void bind_signatures(py::module_& module) {
  py::class_<Signer>(module, "Signer")
      .def(py::init<size_t, size_t, size_t>(), "words"_a, "bands"_a, "rows"_a)
      .def("sign", py::overload_cast<const py::list&>(&Signer::sign, py::const_), "texts"_a,
           "uint64 [texts, 2 + bands]: the witness, which two texts share with the probability of their Jaccard "
           "similarity; the hash of all words; the hash of each band.")
      .def("shingles", &Signer::shingles, "text"_a, "The hashes of a text's shingles, as often as they occur.");
  bind_clusters(module);
}

}  // namespace ingot
