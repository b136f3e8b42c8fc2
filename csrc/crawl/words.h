// Splits text into words: words, and signs as words of their own, much as spaCy's English tokenizer does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace ingot {

// Kinds of a code point, as bits. Python's Unicode data decides, so that they equal str.isspace() and the like.
enum Kind : uint8_t {
  kSpace = 1,
  kLetter = 2,
  kCapital = 4,
  kDigit = 8,    // 0 to 9 alone
  kSign = 16,    // punctuation or a symbol that words neither begin nor end with
  kSymbol = 32,  // punctuation as cc_net lists it, which datatrove took over; control characters and kEnd are in it
  kEnd = 64,     // ends a sentence: Unicode's Sentence_Terminal
  kBreak = 128,  // str.splitlines() splits here
};

const uint8_t* kinds_of_points();
inline uint8_t kind_of(char32_t point) {
  static const uint8_t* const kinds = kinds_of_points();
  return kinds[point];
}

// The code point that begins at byte `at`, which moves on to the next. A byte that begins none reads as U+FFFD.
char32_t decode_long(std::string_view text, size_t& at);
inline char32_t decode(std::string_view text, size_t& at) {
  return static_cast<unsigned char>(text[at]) < 0x80 ? static_cast<char32_t>(text[at++]) : decode_long(text, at);
}
inline char32_t point_at(std::string_view text, size_t at) { return decode(text, at); }

// Where the code point begins that ends before byte `end`, at `begin` or after it.
size_t before(std::string_view text, size_t begin, size_t end);

struct Word {
  size_t begin, end;  // bytes of the text
};

// The words of UTF-8 text, in order. Takes time in proportion to the text's bytes, whatever they are.
std::vector<Word> word_bounds(std::string_view text);

}  // namespace ingot
