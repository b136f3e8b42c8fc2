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
  kDigit = 4,   // 0 to 9 alone
  kSign = 8,    // punctuation or symbol that no word contains at its ends
  kBreak = 16,  // at which str.splitlines() splits
};

uint8_t kind_of(char32_t point);

// The code point that begins at byte `at`, which moves on to the next. A byte that begins none reads as U+FFFD.
char32_t decode(std::string_view text, size_t& at);

struct Word {
  size_t begin, end;  // bytes of the text
};

// The words of UTF-8 text, in order. Linear in the text's bytes, whatever they are.
std::vector<Word> word_bounds(std::string_view text);

}  // namespace ingot
