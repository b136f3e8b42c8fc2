#include "core/documents.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "core/clones.h"
#include "core/text.h"

namespace ingot {
namespace {

constexpr int64_t kBlock = 64;  // tokens compared at once, a multiple of 8

void check_row(int64_t T, int32_t base) {
  if (T < 1 || base < 0 || T > std::numeric_limits<int32_t>::max() - base)
    throw std::invalid_argument(
        text("a row of ", T, " tokens from ", base, " on does not fit 32-bit positions"));
}

INGOT_VECTOR_CLONES void number_positions(int64_t from, int64_t to, int32_t* position_ids) {
  int32_t* out = position_ids + from;
  const auto head = static_cast<int32_t>(before_line(out, to - from));
  const auto rest = static_cast<int32_t>(to - from) - head;
  for (int32_t t = 0; t < head; ++t) out[t] = t;
  if (rest == 0) return;
  out = at_line(out + head);
  for (int32_t t = 0; t < rest; ++t) out[t] = head + t;
}

// Appends base + 1 + (index of each `wanted`) to starts; returns their number.
template <typename Token>
INGOT_INLINE int64_t find_documents(const Token* tokens, int64_t count, Token wanted, int32_t base,
                                    int32_t* starts) {
  int64_t found = 0, from = 0;
  for (; from + kBlock <= count; from += kBlock) {
    const Token* block = tokens + from;
    Token any = 0;  // loops without a branch: the compiler makes vector code of them
    for (int64_t i = 0; i < kBlock; ++i) any |= static_cast<Token>(block[i] == wanted);
    if (any == 0) continue;
    uint8_t equal[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) equal[i] = block[i] == wanted;
    uint64_t words[kBlock / 8];
    std::memcpy(words, equal, sizeof(words));
    for (int64_t i = 0; i < kBlock / 8; ++i)
      for (uint64_t word = words[i]; word != 0; word &= word - 1)  // byte 0 lowest: little-endian
        starts[found++] = base + 1 + static_cast<int32_t>(from + i * 8 + __builtin_ctzll(word) / 8);
  }
  for (; from < count; ++from)
    if (tokens[from] == wanted) starts[found++] = base + 1 + static_cast<int32_t>(from);
  return found;
}

// A template cannot have clones itself.
#define INGOT_FIND(name, Token)                                                        \
  INGOT_VECTOR_CLONES int64_t name(const void* tokens, int64_t count, uint32_t eod,    \
                                   int32_t base, int32_t* starts) {                    \
    const auto wanted = static_cast<Token>(eod);                                       \
    return find_documents(static_cast<const Token*>(tokens), count, wanted, base, starts); \
  }
INGOT_FIND(find8, uint8_t)
INGOT_FIND(find16, uint16_t)
INGOT_FIND(find32, uint32_t)
INGOT_FIND(find64, uint64_t)
#undef INGOT_FIND

int64_t find_documents(const void* tokens, int item_size, int64_t count, uint32_t eod, int32_t base,
                       int32_t* starts) {
  if (item_size < 4 && eod >> 8 * item_size != 0) return 0;  // no token has that id
  const auto find = item_size == 1   ? find8
                    : item_size == 2 ? find16
                    : item_size == 4 ? find32
                                     : find64;
  return find(tokens, count, eod, base, starts);
}

}  // namespace

int64_t scan_documents(const void* row, int item_size, int64_t T, uint32_t eod, bool eod_first,
                       int32_t base, int32_t* position_ids, int32_t* starts) {
  check_row(T, base);
  if (item_size != 1 && item_size != 2 && item_size != 4 && item_size != 8)
    throw std::invalid_argument(text("item size is ", item_size, ", expected 1, 2, 4 or 8"));
  // Input t begins a document if input t - 1 ends one, or if it is itself what begins one.
  const unsigned char* tokens =
      static_cast<const unsigned char*>(row) + (eod_first ? item_size : 0);
  starts[0] = base;
  const int64_t count = 1 + find_documents(tokens, item_size, T - 1, eod, base, starts + 1);
  for (int64_t i = 0; i < count; ++i)
    number_positions(starts[i] - base, i + 1 < count ? starts[i + 1] - base : T, position_ids);
  return count;
}

int64_t lay_out_pieces(const Piece* pieces, int64_t n, int64_t T, int32_t base,
                       int32_t* position_ids, int32_t* starts, unsigned char* counted) {
  check_row(T, base);
  std::memset(counted, 1, static_cast<size_t>(T));
  int64_t count = 0, slot = 0;
  const auto begin_document = [&] {
    if (slot > 0) counted[slot - 1] = 0;
    if (slot < T) starts[count++] = base + static_cast<int32_t>(slot);
  };
  for (int64_t i = 0; i < n; ++i) {
    const int64_t tokens = pieces[i].tokens;
    if (tokens < 1 || tokens > T + 1 - slot)
      throw std::invalid_argument(
          text("a piece of ", tokens, " tokens does not fit ", T + 1 - slot, " free slots"));
    begin_document();
    number_positions(slot, std::min(slot + tokens, T), position_ids);
    slot += tokens;
  }
  if (slot == 0) throw std::invalid_argument("a packed sample without a piece");
  if (slot <= T) {
    begin_document();
    number_positions(slot, T, position_ids);
    std::memset(counted + slot - 1, 0, static_cast<size_t>(T + 1 - slot));
  }
  return count;
}

void pad_row(void* row, int item_size, int64_t used, int64_t width, uint32_t eod) {
  auto* bytes = static_cast<unsigned char*>(row);
  const auto size = static_cast<size_t>(item_size);
  const uint64_t id = eod;  // little-endian, as the files: its low bytes are the id of any width
  for (int64_t t = used; t < width; ++t)
    std::memcpy(bytes + static_cast<size_t>(t) * size, &id, size);
}

}  // namespace ingot
