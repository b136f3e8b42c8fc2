// What the rules of the filters need to know of a text: counts alone, which llm/crawl/filter compares with thresholds.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "crawl/utf8.h"
#include "crawl/words.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace ingot {
namespace {

using Views = std::vector<std::string_view>;

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
  return hash ^ hash >> 32;
}

uint64_t hash_of(std::string_view bytes) {
  uint64_t hash = mix(0, bytes.size());  // as it is, "a\0" would be "b": the last bytes of a chunk are zero where it ends
  for (size_t at = 0; at < bytes.size(); at += 8) {
    uint64_t chunk = 0;
    std::memcpy(&chunk, bytes.data() + at, std::min<size_t>(8, bytes.size() - at));
    hash = mix(hash, chunk);
  }
  return mix(hash, 0);
}

size_t length(std::string_view text) {
  return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char byte) { return (byte & 0xC0) != 0x80; }));
}

std::string_view stripped(std::string_view text) {
  size_t begin = 0, end = text.size();
  for (size_t next = 0; begin < end && (kind_of(decode(text, next)) & kSpace);) begin = next;
  while (begin < end && (kind_of(point_at(text, before(text, begin, end))) & kSpace)) end = before(text, begin, end);
  return text.substr(begin, end - begin);
}

// How often each of at most `most` different hashes has come. What has the same hash is taken for the same.
class Counts {
 public:
  explicit Counts(size_t most) {
    while (size_t{1} << bits_ < 2 * most) ++bits_;
    slots_.resize(size_t{1} << bits_);
  }
  // 0 at first; the caller raises it.
  size_t& operator[](uint64_t hash) {
    size_t at = hash * 0xD6E8FEB86659FD93u >> (64 - bits_);
    while (slots_[at].second && slots_[at].first != hash) at = (at + 1) & (slots_.size() - 1);
    slots_[at].first = hash;
    return slots_[at].second;
  }

 private:
  unsigned bits_ = 1;
  std::vector<std::pair<uint64_t, size_t>> slots_;
};

// Pieces of a text: how many, how many that have come before, and the characters of those.
struct Pieces {
  Counts seen;
  size_t all = 0, repeated = 0, characters = 0;
  void add(std::string_view piece) {
    const bool again = seen[hash_of(piece)]++;
    ++all;
    repeated += again;
    characters += again ? length(piece) : 0;
  }
};

// Lines as str.splitlines() has them: all, those that begin with a bullet, those that end with an ellipsis.
std::vector<size_t> count_lines(std::string_view text) {
  size_t all = 0, bullets = 0, ellipses = 0, begin = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = at;
    const char32_t point = decode(text, at);
    const bool breaks = kind_of(point) & kBreak;
    if (!breaks && at < text.size()) continue;
    const std::string_view line = stripped(text.substr(begin, (breaks ? end : at) - begin));
    ++all;
    const std::string_view last = line.substr(line.size() - std::min<size_t>(3, line.size()));
    bullets += line.substr(0, 1) == "-" || line.substr(0, 3) == "•";
    ellipses += last == "..." || last == "…";
    if (point == '\r' && at < text.size() && text[at] == '\n') ++at;
    begin = at;
  }
  return {all, bullets, ellipses};
}

// What lies between line feeds: not blank (all, ended by a mark, short, characters repeated); runs of them split at.
std::vector<size_t> count_chunks(std::string_view text, size_t newlines, size_t short_line) {
  Pieces chunks{Counts(newlines + 1)}, full{Counts(newlines + 1)};
  size_t ended = 0, shorts = 0;
  for (size_t begin = 0, end; begin <= text.size(); begin = end + 1) {
    end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = text.substr(begin, end - begin);
    if (!line.empty() || begin == 0 || end == text.size()) chunks.add(line);  // as re.split("\n+") has them
    if (stripped(line).empty()) continue;
    full.add(line);
    ended += (kind_of(point_at(line, before(line, 0, line.size()))) & kEnd) != 0;
    shorts += length(line) <= short_line;
  }
  return {full.all, ended, shorts, full.characters, chunks.all, chunks.repeated, chunks.characters};
}

// What lies between empty lines, the space around the text left out.
std::vector<size_t> count_paragraphs(std::string_view text, size_t newlines) {
  Pieces paragraphs{Counts(newlines + 1)};
  text = stripped(text);
  for (size_t begin = 0, end; begin <= text.size(); begin = text.find_first_not_of('\n', end)) {
    end = std::min(text.find("\n\n", begin), text.size());
    paragraphs.add(text.substr(begin, end - begin));
  }
  return {paragraphs.all, paragraphs.repeated, paragraphs.characters};
}

// All, not of symbols alone (and their characters), with a letter, different stop words. Appends length and hash of each.
std::vector<size_t> count_words(const Views& words, const std::vector<std::string>& stop_words,
                                std::vector<size_t>& lengths, std::vector<uint64_t>& hashes) {
  size_t plain_words = 0, plain_characters = 0, letter_words = 0;
  std::vector<uint64_t> missing;
  for (const std::string_view word : stop_words) missing.push_back(hash_of(word));
  for (const std::string_view word : words) {
    size_t characters = 0, plain = 0, letters = 0;
    for (size_t at = 0; at < word.size(); ++characters) {
      const uint8_t kind = kind_of(decode(word, at));
      plain |= !(kind & kSymbol);
      letters |= (kind & kLetter) != 0;
    }
    plain_words += plain;
    plain_characters += plain * characters;
    letter_words += letters;
    lengths.push_back(characters);
    hashes.push_back(hash_of(word));
    const auto stop = std::find(missing.begin(), missing.end(), hashes.back());
    if (stop != missing.end()) missing.erase(stop);
  }
  return {words.size(), plain_words, plain_characters, letter_words, stop_words.size() - missing.size()};
}

// Leaves of the places of the (n - 1)-grams that repeat those of the n-grams that do: both parts of such a one repeat.
// Returns how often the most frequent n-gram comes, and the place of the first of equals.
std::pair<size_t, size_t> keep_repeated(const std::vector<uint64_t>& grams, std::vector<size_t>& places) {
  size_t kept = 0, most = !grams.empty(), first = 0;
  for (size_t i = 0; i + 1 < places.size(); ++i)
    if (places[i + 1] == places[i] + 1) places[kept++] = places[i];
  places.resize(kept);
  Counts counts(kept);
  for (const size_t place : places) ++counts[grams[place]];
  kept = 0;
  for (const size_t place : places) {
    const size_t count = counts[grams[place]];
    if (count > most) most = count, first = place;
    if (count > 1) places[kept++] = place;
  }
  places.resize(kept);
  return {most, first};
}

// Characters of the n-grams that have come before, none of them counted twice. places: of those that repeat.
size_t duplicate_characters(const std::vector<uint64_t>& grams, const std::vector<size_t>& places,
                            const std::vector<size_t>& starts, size_t n) {
  Counts counts(places.size());
  size_t characters = 0, next = 0;
  for (const size_t place : places) {
    if (place < next || !counts[grams[place]]++) continue;
    characters += starts[place + n] - starts[place];
    next = place + n;
  }
  return characters;
}

Views words_of(std::string_view text) {
  Views words;
  for (const Word word : word_bounds(text)) words.push_back(text.substr(word.begin, word.end - word.begin));
  return words;
}

// Statistics of llm/crawl/filter/page.py, in its order; then the n-grams of Gopher's table A1, if asked for.
py::tuple statistics(const py::str& string, const std::optional<std::vector<py::str>>& tokens,
                     const std::vector<std::string>& stop_words, size_t short_line, bool ngrams) {
  const std::string_view text = utf8(string);
  const auto times = [&](std::string_view part) {
    size_t count = 0;
    for (size_t at = 0; (at = text.find(part, at)) != text.npos; at += part.size()) ++count;
    return count;
  };
  Views words = tokens ? Views() : words_of(text);
  if (tokens) for (const py::str& token : *tokens) words.push_back(utf8(token));
  const size_t newlines = times("\n");
  std::vector<size_t> found{length(text), newlines, times("#"), times("...") + times("…")}, starts{0}, repeated;
  std::vector<uint64_t> hashes;
  for (const auto& counts : {count_words(words, stop_words, starts, hashes), count_lines(text),
                             count_chunks(text, newlines, short_line), count_paragraphs(text, newlines)})
    found.insert(found.end(), counts.begin(), counts.end());
  for (size_t i = 1; i < starts.size(); ++i) starts[i] += starts[i - 1];  // characters of the words before each
  std::vector<uint64_t> grams(hashes.size());
  std::vector<size_t> places(hashes.size());  // of the n-grams that repeat; of words all
  std::iota(places.begin(), places.end(), 0);
  for (size_t n = 1; ngrams && n <= 10; ++n) {
    grams.resize(hashes.size() < n ? 0 : hashes.size() + 1 - n);
    for (size_t i = 0; i < grams.size(); ++i) grams[i] = mix(grams[i], hashes[i + n - 1]);
    if (n == 1) continue;
    const auto [most, first] = keep_repeated(grams, places);
    // Of the most frequent: all its occurrences, with the spaces between its words.
    const size_t top = most ? most * (starts[first + n] - starts[first] + n - 1) : 0;
    repeated.push_back(n < 5 ? top : duplicate_characters(grams, places, starts, n));
  }
  return py::make_tuple(found, repeated);
}

// As spaCy's sentencizer: a sentence ends after a mark, and what is neither mark nor sign begins the next.
size_t sentences(const py::str& text) {
  size_t count = 1;
  bool ended = false;
  for (const std::string_view word : words_of(utf8(text))) {
    size_t next = 0;
    const uint8_t kind = kind_of(decode(word, next));
    const bool mark = (kind & kEnd) && next == word.size();
    count += ended && !(kind & (kSign | kSymbol));
    ended = mark || (ended && (kind & (kSign | kSymbol)));
  }
  return count;
}

// Hashes of the runs of n words, written in small letters; words without letter and digit are left out.
py::array_t<uint64_t> ngrams(const py::str& text, size_t n) {
  std::vector<uint64_t> hashes;
  for (const std::string_view word : words_of(utf8(text))) {
    uint64_t hash = 0;
    bool plain = false;
    for (size_t at = 0; at < word.size();) {
      const char32_t point = decode(word, at);
      plain |= (kind_of(point) & (kLetter | kDigit)) != 0;
      hash = mix(hash, Py_UNICODE_TOLOWER(point));
    }
    if (plain) hashes.push_back(hash);
  }
  const size_t count = hashes.size() < n ? 0 : hashes.size() + 1 - n;
  std::vector<uint64_t> grams(count);
  for (size_t k = 0; k < n; ++k)
    for (size_t i = 0; i < count; ++i) grams[i] = mix(grams[i], hashes[i + k]);
  return py::array_t<uint64_t>(static_cast<py::ssize_t>(count), grams.data());
}

}  // namespace

void bind_statistics(py::module_& module) {
  module.def("words", [](const py::str& text) {
    py::list words;
    for (const std::string_view word : words_of(utf8(text))) words.append(py::str(word.data(), word.size()));
    return words;
  }, "text"_a);
  module.def("statistics", &statistics, "text"_a, "words"_a, "stop_words"_a, "short_line"_a, "ngrams"_a);
  module.def("sentences", &sentences, "text"_a);
  module.def("ngrams", &ngrams, "text"_a, "n"_a);
}

}  // namespace ingot
