// plan_window: best-fit decreasing in time proportional to the pieces.
#include <limits>
#include <numeric>
#include <stdexcept>

#include "core/packing.h"
#include "core/text.h"

namespace ingot {
namespace {

constexpr int64_t kNone = -1;

// A set of numbers below n, as bits under bits that say which words below are not empty.
class NumberSet {
 public:
  explicit NumberSet(size_t n) {
    do {
      n = (n + 63) / 64;
      levels_.emplace_back(n, uint64_t{0});
    } while (n > 1);
  }

  void insert(size_t i) {
    for (auto& level : levels_) {
      level[i / 64] |= uint64_t{1} << (i % 64);
      i /= 64;
    }
  }

  void erase(size_t i) {
    for (auto& level : levels_) {
      level[i / 64] &= ~(uint64_t{1} << (i % 64));
      if (level[i / 64] != 0) return;
      i /= 64;
    }
  }

  // The smallest number that is not below i, or kNone.
  int64_t at_least(size_t i) const {
    for (size_t height = 0; height < levels_.size(); ++height) {
      if (i / 64 >= levels_[height].size()) return kNone;
      const uint64_t rest = levels_[height][i / 64] >> (i % 64);
      if (rest != 0) {
        i += lowest_bit(rest);
        while (height > 0) {
          --height;
          i = i * 64 + lowest_bit(levels_[height][i]);
        }
        return static_cast<int64_t>(i);
      }
      i = i / 64 + 1;
    }
    return kNone;
  }

 private:
  static size_t lowest_bit(uint64_t word) { return static_cast<size_t>(__builtin_ctzll(word)); }
  std::vector<std::vector<uint64_t>> levels_;
};

// The rows begun so far, by their free space.
class OpenRows {
 public:
  explicit OpenRows(int64_t capacity)
      : capacity_(capacity),
        spaces_(static_cast<size_t>(capacity)),
        newest_(static_cast<size_t>(capacity), kNone) {}

  // Puts a piece into the best row there is, or a new one, and returns that row.
  int64_t put(int64_t tokens) {
    int64_t row = 0, space = spaces_.at_least(static_cast<size_t>(tokens));
    if (space == kNone) {
      row = static_cast<int64_t>(below_.size());
      below_.push_back(kNone);
      space = capacity_;
    } else {
      row = pop(static_cast<size_t>(space));
    }
    if (space > tokens) push(static_cast<size_t>(space - tokens), row);
    return row;
  }

  size_t size() const { return below_.size(); }

 private:
  int64_t pop(size_t space) {
    const int64_t row = newest_[space];
    newest_[space] = below_[static_cast<size_t>(row)];
    if (newest_[space] == kNone) spaces_.erase(space);
    return row;
  }

  void push(size_t space, int64_t row) {
    if (newest_[space] == kNone) spaces_.insert(space);
    below_[static_cast<size_t>(row)] = newest_[space];
    newest_[space] = row;
  }

  int64_t capacity_;
  NumberSet spaces_;             // free spaces that some row has
  std::vector<int64_t> newest_;  // by free space: the row on top of the stack of those that have it
  std::vector<int64_t> below_;   // by row: the next one in its stack
};

std::vector<Piece> cut(const std::vector<Piece>& documents, int64_t T) {
  std::vector<Piece> pieces;
  pieces.reserve(documents.size());
  for (const Piece& document : documents) {
    if (document.tokens < 1 || document.start < 0 ||
        document.start > std::numeric_limits<int64_t>::max() - document.tokens)
      throw std::invalid_argument(
          text("a document of ", document.tokens, " tokens from ", document.start, " on"));
    const int64_t whole = (document.tokens - 1) / T, rest = document.tokens - whole * T;
    for (int64_t i = 0; i < whole; ++i) pieces.push_back({document.start + i * T, T + 1});
    if (rest > 1 || whole == 0) pieces.push_back({document.start + whole * T, rest});
  }
  return pieces;
}

// From the longest to the shortest, equal ones in their order.
std::vector<Piece> sorted(const std::vector<Piece>& pieces, int64_t longest) {
  std::vector<size_t> next(static_cast<size_t>(longest) + 2, 0);  // by longest - tokens
  const auto key = [&](const Piece& piece) { return static_cast<size_t>(longest - piece.tokens); };
  for (const Piece& piece : pieces) ++next[key(piece) + 1];
  for (size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
  std::vector<Piece> out(pieces.size());
  for (const Piece& piece : pieces) out[next[key(piece)]++] = piece;
  return out;
}

}  // namespace

PackedRows plan_window(const std::vector<Piece>& documents, int64_t seq_len) {
  if (seq_len < 1 || seq_len >= std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(
        text("seq_len is ", seq_len, ", expected at least 1 and less than 2^31 - 1"));
  const std::vector<Piece> pieces = sorted(cut(documents, seq_len), seq_len + 1);
  OpenRows rows(seq_len + 1);
  std::vector<int64_t> row_of(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) row_of[i] = rows.put(pieces[i].tokens);
  PackedRows out{std::vector<Piece>(pieces.size()), std::vector<int64_t>(rows.size(), 0)};
  // First how many pieces each row has, then where they begin; filling moves that to their end.
  for (const int64_t row : row_of) ++out.row_ends[static_cast<size_t>(row)];
  std::exclusive_scan(out.row_ends.begin(), out.row_ends.end(), out.row_ends.begin(), int64_t{0});
  for (size_t i = 0; i < pieces.size(); ++i) {
    int64_t& at = out.row_ends[static_cast<size_t>(row_of[i])];
    out.pieces[static_cast<size_t>(at++)] = pieces[i];
  }
  return out;
}

}  // namespace ingot
