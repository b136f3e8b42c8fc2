#include "crawl/words.h"

#include <Python.h>

namespace ingot {
namespace {

constexpr char32_t kPoints = 0x110000, kReplacement = 0xFFFD;

// First and last code points of signs, beside those of ASCII, and of Sentence_Terminal.
constexpr char32_t kSigns[][2] = {{0xA1, 0xBF}, {0x60C, 0x60C}, {0x61B, 0x61B}, {0x61F, 0x61F}, {0x66A, 0x66A},
    {0x6D4, 0x6D4}, {0x964, 0x964}, {0x2013, 0x205E}, {0x20A0, 0x218B}, {0x2195, 0x2BFF}, {0x3001, 0x303F},
    {0xFF01, 0xFF65}, {0x1F000, 0x1FAFF}};
constexpr char32_t kEnds[][2] = {{'!', '!'}, {'.', '.'}, {'?', '?'}, {0x589, 0x589}, {0x61D, 0x61F}, {0x6D4, 0x6D4},
    {0x700, 0x702}, {0x7F9, 0x7F9}, {0x837, 0x837}, {0x839, 0x839}, {0x83D, 0x83E}, {0x964, 0x965}, {0x104A, 0x104B},
    {0x1362, 0x1362}, {0x1367, 0x1368}, {0x166E, 0x166E}, {0x1735, 0x1736}, {0x17D4, 0x17D6}, {0x17D9, 0x17DA},
    {0x1803, 0x1803}, {0x1809, 0x1809}, {0x1944, 0x1945}, {0x1AA8, 0x1AAB}, {0x1B5A, 0x1B5B}, {0x1B5E, 0x1B5F},
    {0x1B7D, 0x1B7E}, {0x1C3B, 0x1C3C}, {0x1C7E, 0x1C7F}, {0x203C, 0x203D}, {0x2047, 0x2049}, {0x2E2E, 0x2E2E},
    {0x2E3C, 0x2E3C}, {0x2E53, 0x2E54}, {0x3002, 0x3002}, {0xA4FF, 0xA4FF}, {0xA60E, 0xA60F}, {0xA6F3, 0xA6F3},
    {0xA6F7, 0xA6F7}, {0xA876, 0xA877}, {0xA8CE, 0xA8CF}, {0xA92F, 0xA92F}, {0xA9C8, 0xA9C9}, {0xAA5D, 0xAA5F},
    {0xAAF0, 0xAAF1}, {0xABEB, 0xABEB}, {0xFE52, 0xFE52}, {0xFE56, 0xFE57}, {0xFF01, 0xFF01}, {0xFF0E, 0xFF0E},
    {0xFF1F, 0xFF1F}, {0xFF61, 0xFF61}};
constexpr std::u32string_view kSymbols = U"«´»–—’“”„…∶━►、。〈〉《》「」【】！％（），．１：；？～";

template <size_t n>
bool within(char32_t point, const char32_t (&ranges)[n][2]) {
  for (const auto& range : ranges)
    if (range[0] <= point && point <= range[1]) return true;
  return false;
}

std::vector<uint8_t> table_of_kinds() {
  std::vector<uint8_t> kinds(kPoints);
  for (char32_t point = 0; point < kPoints; ++point) {
    const bool ascii = point < 0x80, wordlike = Py_UNICODE_ISALNUM(point) || Py_UNICODE_ISSPACE(point);
    const auto set = [&, bits = &kinds[point]](Kind kind, bool is) { *bits |= is ? kind : 0; };
    set(kSpace, Py_UNICODE_ISSPACE(point));
    set(kLetter, Py_UNICODE_ISALPHA(point));
    set(kCapital, Py_UNICODE_ISUPPER(point));
    set(kDigit, ascii && Py_UNICODE_ISALNUM(point) && !Py_UNICODE_ISALPHA(point));
    set(kSign, ascii ? point && std::string_view(",:;!?()[]{}<>_#*&'\"`").find(char(point)) != std::string_view::npos
                     : !wordlike && within(point, kSigns));
    set(kEnd, within(point, kEnds));
    set(kSymbol, (ascii && !wordlike) || point < 9 || (point > 10 && point < 32) || (point > 126 && point < 160) ||
                     within(point, kEnds) || kSymbols.find(point) != std::u32string_view::npos);
    set(kBreak, Py_UNICODE_ISLINEBREAK(point));
  }
  return kinds;
}

// Whether a sign that begins a piece is a word of its own. `next`: what follows it, 0 at the end of the piece.
bool leads(char32_t sign, char32_t next) {
  if (sign == '+') return !(kind_of(next) & kDigit);
  return (kind_of(sign) & kSign) || sign == '%' || sign == '=' || sign == '$' || (sign == '.' && next == '.');
}

// Whether a sign that ends a piece is a word of its own. `last`: what precedes it; `last_but_one`: what precedes that.
bool trails(char32_t last_but_one, char32_t last, char32_t sign) {
  if (sign == '%' || sign == '$' || sign == '+') return kind_of(last) & kDigit;
  if (sign != '.') return kind_of(sign) & kSign;
  if (kind_of(last) & kCapital) return kind_of(last_but_one) & kCapital;  // not in "U.S." and "J."
  return (kind_of(last) & (kLetter | kDigit | kSign)) || last == '%' || last == '-' || last == '+' || last == '.';
}

// Whether a run of one sign inside a piece divides it, between the code points `left` and `right`.
bool divides(char32_t left, char32_t sign, size_t run, char32_t right) {
  const uint8_t ahead = kind_of(left), behind = kind_of(right);
  const bool figures = (ahead & kDigit) && (behind & kDigit);
  switch (sign) {
    case '.': return run > 1 || ((ahead & kLetter) && !(ahead & kCapital) && (behind & kCapital));
    case ',': return (ahead & kLetter) && (behind & kLetter);
    case '+': case '*': case '^': return figures;
    case '-': case '~': case ':': case '<': case '>': case '=': case '/': case 0x2013: case 0x2014:
      return ((ahead & (kLetter | kDigit)) && (behind & kLetter)) || (sign == '-' && figures);
    default: return sign == 0x2026 || sign == 0xA9 || sign == 0xAE || sign == 0xB0 ||  // ellipsis and symbols
                    ((kind_of(sign) & kSign) && (sign >= 0x1F000 || (sign >= 0x2100 && sign < 0x3000)));
  }
}

// Where the ending of a contraction begins ('s, n't, 're, 've, 'll, 'd, 'm), or the end of the piece.
size_t contraction(std::string_view text, size_t begin, size_t end) {
  for (const std::string_view quote : {"'", "’"}) {
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
    if (!(kind_of(sign) & kLetter) && at > begin && next < end && divides(left, sign, next - at, point_at(text, next))) {
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
    const size_t last = before(text, begin, at);
    const char32_t sign = point_at(text, at);
    if (!trails(last > begin ? point_at(text, before(text, begin, last)) : 0, point_at(text, last), sign)) break;
    while (sign == '.' && at > begin + 1 && text[at - 1] == '.') --at;
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
