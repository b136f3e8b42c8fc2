#include "crawl/words.h"

#include <Python.h>

namespace ingot {
namespace {

constexpr char32_t kPoints = 0x110000, kReplacement = 0xFFFD;

constexpr std::string_view kAsciiSigns = ",:;!?()[]{}<>_#*&'\"`";
constexpr char32_t kSigns[][2] = {{0xA1, 0xBF}, {0x60C, 0x61F}, {0x66A, 0x66A}, {0x6D4, 0x6D4}, {0x964, 0x964},
    {0x2013, 0x205E}, {0x20A0, 0x218B}, {0x2195, 0x2BFF}, {0x3001, 0x303F}, {0xFF01, 0xFF65}, {0x1F000, 0x1FAFF}};
constexpr std::u32string_view kSymbols = U"«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～";  // and ASCII's
constexpr std::u32string_view kEnds =  // those of scripts in use
    U".!?\u0589\u061D\u061E\u061F\u06D4\u0964\u0965\u104A\u104B\u1362\u1367\u1368\u17D4\u17D5\u203C\u203D\u2047\u2048"
    U"\u2049\u3002\uFF01\uFF0E\uFF1F\uFF61";

std::vector<uint8_t> table_of_kinds() {
  std::vector<uint8_t> kinds(kPoints);
  for (char32_t point = 0; point < kPoints; ++point) {
    const bool wordlike = Py_UNICODE_ISALNUM(point) || Py_UNICODE_ISSPACE(point);
    bool sign = false;
    for (const auto& [first, last] : kSigns) sign |= !wordlike && first <= point && point <= last;
    kinds[point] = static_cast<uint8_t>(
        (Py_UNICODE_ISSPACE(point) ? kSpace : 0) | (Py_UNICODE_ISALPHA(point) ? kLetter : 0) |
        (Py_UNICODE_ISUPPER(point) ? kCapital : 0) | ('0' <= point && point <= '9' ? kDigit : 0) |
        (sign ? kSign : 0) | (point < 0xA0 && !wordlike ? kSymbol : 0) | (Py_UNICODE_ISLINEBREAK(point) ? kBreak : 0));
  }
  // Not looked up for each of a million code points: every process waits for this table.
  for (const char sign : kAsciiSigns) kinds[static_cast<size_t>(sign)] |= kSign;
  for (const char32_t symbol : kSymbols) kinds[symbol] |= kSymbol;
  for (const char32_t end : kEnds) kinds[end] |= kSymbol | kEnd;
  return kinds;
}

// Whether a sign at an end of a piece is a word of its own, but for full stops.
bool stands_apart(char32_t sign) { return (kind_of(sign) & kSign) || sign == '%' || sign == '$' || sign == '='; }

// Whether the full stop that ends a piece is a word of its own: not in "p." and "U.S."
bool ends_sentence(std::string_view text, size_t begin, size_t stop) {
  if (stop == begin) return false;
  const size_t last = before(text, begin, stop);
  return !(kind_of(point_at(text, last)) & kLetter) || (last > begin && text[last - 1] != '.');
}

// Whether a run of one sign inside a piece is a word of its own, between the code points `left` and `right`.
bool divides(char32_t left, char32_t sign, size_t run, char32_t right) {
  const uint8_t ahead = kind_of(left), behind = kind_of(right);
  if (sign >= 0x80) return kind_of(sign) & kSign;
  if (sign == '.') return run > 1 || ((ahead & kLetter) && !(ahead & kCapital) && (behind & kCapital));
  if (sign == ',') return (ahead & kLetter) && (behind & kLetter);
  if (std::string_view("+-*^").find(static_cast<char>(sign)) != std::string_view::npos && (behind & kDigit))
    return ahead & kDigit;
  return std::string_view("-~:<>=/").find(static_cast<char>(sign)) != std::string_view::npos &&
         (ahead & (kLetter | kDigit)) && (behind & kLetter);
}

// What lies between the signs at the ends of a piece.
void split_inside(std::string_view text, size_t begin, size_t end, std::vector<Word>& words) {
  const bool address = text.substr(begin, end - begin).find("://") != std::string_view::npos;
  size_t start = begin;
  char32_t left = 0;
  for (size_t at = begin; at < end && !address;) {
    size_t next = at;
    const char32_t sign = decode(text, next);
    while ((sign == '.' || sign == '-') && next < end && text[next] == static_cast<char>(sign)) ++next;
    if (at > start && next < end && (kind_of(left) & kLetter) && (sign == '\'' || sign == 0x2019)) {
      words.push_back({start, at});  // "'s", "'t", "'re" are words
      start = at;
    } else if (at > begin && next < end && !(kind_of(sign) & kLetter) &&
               divides(left, sign, next - at, point_at(text, next))) {
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
  for (size_t next = begin; begin < end; begin = next) {
    const char32_t sign = decode(text, next);
    while (sign == '.' && next < end && text[next] == '.') ++next;
    if (!stands_apart(sign) && (sign != '.' || next - begin < 2)) break;
    words.push_back({begin, next});
  }
  std::vector<Word> behind;  // from the last to the first
  while (begin < end) {
    size_t at = before(text, begin, end);
    const char32_t sign = point_at(text, at);
    while (sign == '.' && at > begin && text[at - 1] == '.') --at;
    if (sign == '.' ? end - at == 1 && !ends_sentence(text, begin, at) : !stands_apart(sign)) break;
    behind.push_back({at, end});
    end = at;
  }
  split_inside(text, begin, end, words);
  words.insert(words.end(), behind.rbegin(), behind.rend());
}

}  // namespace

const uint8_t* kinds_of_points() {
  static const std::vector<uint8_t> kinds = table_of_kinds();
  return kinds.data();
}

char32_t decode_long(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const char32_t first = byte(at++);
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

size_t before(std::string_view text, size_t begin, size_t end) {
  size_t at = end - 1;
  while (at > begin && end - at < 4 && (text[at] & 0xC0) == 0x80) --at;
  size_t next = at;
  decode(text, next);
  return next == end ? at : end - 1;
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
