#include "crawl/words.h"

#include <Python.h>

namespace ingot {
namespace {

constexpr char32_t kPoints = 0x110000, kReplacement = 0xFFFD;

bool between(char32_t point, char32_t first, char32_t last) { return first <= point && point <= last; }

bool is_sign(char32_t point) {
  if (point < 0x80) return point && std::string_view(",:;!?()[]{}<>_#*&'\"`").find(char(point)) != std::string_view::npos;
  return between(point, 0xA1, 0xBF) || between(point, 0x2010, 0x205E) || between(point, 0x20A0, 0x2BFF) ||
         between(point, 0x3001, 0x303F) || between(point, 0xFF01, 0xFF65) || between(point, 0x1F000, 0x1FAFF);
}

std::vector<uint8_t> table_of_kinds() {
  std::vector<uint8_t> kinds(kPoints);
  for (char32_t point = 0; point < kPoints; ++point) {
    uint8_t kind = 0;
    if (Py_UNICODE_ISSPACE(point)) kind |= kSpace;
    if (Py_UNICODE_ISLINEBREAK(point)) kind |= kBreak;
    if (Py_UNICODE_ISALPHA(point)) kind |= kLetter;
    if (between(point, '0', '9')) kind |= kDigit;
    if (!kind && !Py_UNICODE_ISALNUM(point) && is_sign(point)) kind |= kSign;
    kinds[point] = kind;
  }
  return kinds;
}

char32_t point_at(std::string_view text, size_t at) { return decode(text, at); }

// Where the code point begins that ends before byte `end`.
size_t before(std::string_view text, size_t begin, size_t end) {
  size_t at = end - 1;
  while (at > begin && end - at < 4 && (text[at] & 0xC0) == 0x80) --at;
  size_t next = at;
  decode(text, next);
  return next == end ? at : end - 1;
}

// Whether a sign that begins a piece is a word of its own. `next`: what follows it, 0 at the end of the piece.
bool leads(char32_t sign, char32_t next) {
  if (kind_of(sign) & kSign) return true;
  if (sign == '+') return !(kind_of(next) & kDigit);
  return sign == '%' || sign == '=' || sign == '$' || (sign == '.' && next == '.');
}

// Whether a sign that ends a piece is a word of its own. `last`: what precedes it; `last_but_one`: what precedes that.
bool trails(char32_t last_but_one, char32_t last, char32_t sign) {
  if (kind_of(sign) & kSign) return true;
  if (sign == '%' || sign == '$' || sign == '+') return kind_of(last) & kDigit;
  if (sign != '.') return false;
  if (!Py_UNICODE_ISUPPER(last)) return last != '/' && last != '\\' && last != '@';
  return Py_UNICODE_ISUPPER(last_but_one);  // not in "U.S." and "J."
}

// Whether a run of the same sign inside a piece divides it, between the code points `left` and `right`.
bool divides(char32_t left, char32_t sign, size_t run, char32_t right) {
  const uint8_t before = kind_of(left), after = kind_of(right);
  switch (sign) {
    case '.': return run > 1;
    case ',': return (before & kLetter) && (after & kLetter);
    case '-': if (run == 1 && (before & kDigit) && (after & kDigit)) return true; [[fallthrough]];
    case '~': case ':': case '<': case '>': case '=': case '/': return (before & (kLetter | kDigit)) && (after & kLetter);
    case '+': case '*': case '^': return (before & kDigit) && (after & kDigit);
    default: return sign >= 0x80 && sign != 0x2019 && (kind_of(sign) & kSign);
  }
}

// Where the ending of a contraction begins ('s, n't, 're, 've, 'll, 'd, 'm), or the end of the piece.
size_t contraction(std::string_view text, size_t begin, size_t end) {
  for (const std::string_view quote : {"'", "\u2019"}) {
    for (const std::string_view letters : {"s", "S", "t", "re", "ve", "ll", "d", "m"}) {
      const size_t size = quote.size() + letters.size();
      if (end - begin <= size || text.substr(end - letters.size(), letters.size()) != letters) continue;
      if (text.substr(end - size, quote.size()) != quote) continue;
      if (letters != "t") return end - size;
      if (end - begin > size + 1 && (text[end - size - 1] | 0x20) == 'n') return end - size - 1;
    }
  }
  return end;
}

// What lies between the signs at the ends of a piece.
void split_inside(std::string_view text, size_t begin, size_t end, std::vector<Word>& words) {
  const bool address = text.substr(begin, end - begin).find("://") != std::string_view::npos;
  size_t start = begin;
  char32_t left = 0;
  for (size_t at = begin; at < end && !address;) {
    size_t next = at;
    const char32_t sign = decode(text, next);
    if (sign == '.' || sign == '-')
      while (next < end && text[next] == static_cast<char>(sign)) ++next;
    if (at > begin && next < end && divides(left, sign, next - at, point_at(text, next))) {
      if (at > start) words.push_back({start, at});
      words.push_back({at, next});
      start = next;
    }
    left = sign;
    at = next;
  }
  if (start < end) words.push_back({start, end});
}

// The words of a piece without spaces.
void split(std::string_view text, size_t begin, size_t end, std::vector<Word>& words) {
  while (begin < end) {
    size_t next = begin;
    const char32_t sign = decode(text, next);
    if (!leads(sign, next < end ? point_at(text, next) : 0)) break;
    while (sign == '.' && next < end && text[next] == '.') ++next;
    words.push_back({begin, next});
    begin = next;
  }
  std::vector<Word> behind;  // from the last to the first
  while (begin < end) {
    size_t at = before(text, begin, end);
    if (at == begin) break;
    size_t last = before(text, begin, at);
    const char32_t sign = point_at(text, at);
    if (!trails(last > begin ? point_at(text, before(text, begin, last)) : 0, point_at(text, last), sign)) break;
    while (sign == '.' && at > begin && text[at - 1] == '.') --at;
    behind.push_back({at, end});
    end = at;
  }
  const size_t stem = contraction(text, begin, end);
  split_inside(text, begin, stem, words);
  if (stem < end) words.push_back({stem, end});
  words.insert(words.end(), behind.rbegin(), behind.rend());
}

}  // namespace

uint8_t kind_of(char32_t point) {
  static const std::vector<uint8_t> kinds = table_of_kinds();
  return kinds[point];
}

char32_t decode(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const char32_t first = byte(at++);
  if (first < 0x80) return first;
  const size_t more = first >= 0xF0 ? 3 : first >= 0xE0 ? 2 : 1;
  if (first < 0xC2 || first > 0xF4 || text.size() - at < more) return kReplacement;
  char32_t point = first & (0x3F >> more);
  for (size_t i = 0; i < more; ++i) {
    if ((byte(at + i) & 0xC0) != 0x80) return kReplacement;
    point = point << 6 | (byte(at + i) & 0x3F);
  }
  if (point >= kPoints) return kReplacement;
  at += more;
  return point;
}

std::vector<Word> word_bounds(std::string_view text) {
  std::vector<Word> words;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    size_t next = at;
    while (at < text.size() && !(kind_of(decode(text, next)) & kSpace)) at = next;
    if (begin < at) split(text, begin, at, words);
    at = at < text.size() ? next : at;
  }
  return words;
}

}  // namespace ingot
