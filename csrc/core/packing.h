// Best-fit packing: samples made of whole documents by a plan that is computed once, ahead of
// training. The plan is a file, so that any sample is found in constant time.
//
// A document of L tokens is one piece if L <= T + 1. A longer one is cut into pieces of T + 1
// tokens, and a shorter last one. Pieces overlap by one token, so each of the document's L - 1
// targets is in exactly one piece. A row holds pieces of at most T + 1 tokens together.
//
// The file, little-endian: a header of 56 bytes (magic "INGOTPLN", then as u64: version = 1, T,
// tokens of the corpus, rows R, pieces P, tokens of all pieces), the pieces int64[P, 2] (first
// token in the corpus, tokens), and for each row the pieces up to its end int64[R].
// llm/data/samples/packing.py writes it, and reads it as the twin of this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/token_file.h"

namespace ingot {

// `tokens` tokens of a corpus from `start` on, all of one document. As in the file.
struct Piece {
  int64_t start;
  int64_t tokens;
};

// The pieces of one row.
struct Pieces {
  const Piece *first, *last;
  const Piece* begin() const { return first; }
  const Piece* end() const { return last; }
  size_t size() const { return static_cast<size_t>(last - first); }
};

// A plan mapped read-only. What a row says is checked when it is asked for, never all of the file.
class PackPlan {
 public:
  // Maps `path`, made for samples of `seq_len` tokens from a corpus of `corpus_tokens`. Throws
  // std::runtime_error that names the file, what was found and what was expected.
  PackPlan(const std::string& path, int64_t seq_len, int64_t corpus_tokens);
  ~PackPlan();
  PackPlan(const PackPlan&) = delete;
  PackPlan& operator=(const PackPlan&) = delete;

  int64_t rows() const { return rows_; }
  // Valid as long as the plan: at least one piece, inside the corpus, T + 1 tokens at most.
  // std::out_of_range outside [0, rows()), std::runtime_error if the file says anything else.
  Pieces pieces(int64_t row) const;
  // Targets of the row that count: all tokens but the first of each piece. Throws as pieces().
  int64_t targets(int64_t row) const;

  // Throws std::runtime_error if the file became shorter than the map: a read past its new end
  // would end the process with SIGBUS. Called once per batch.
  void check_not_truncated() const;

 private:
  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... what) const;
  void read_header();

  File file_;
  int64_t seq_len_, corpus_tokens_;
  int64_t rows_ = 0, n_pieces_ = 0;
  size_t n_bytes_ = 0;
  void* map_;
  const Piece* pieces_ = nullptr;
  const int64_t* row_ends_ = nullptr;
};

struct PackedRows {
  std::vector<Piece> pieces;      // of all rows, one row after another
  std::vector<int64_t> row_ends;  // pieces up to the end of each row
};

// Packs documents (the whole of each, or of one that is cut between calls, a number of whole
// pieces) by best-fit decreasing: pieces from the longest to the shortest, equal ones in the order
// given, each into the row with the least free space that suffices, among equals the one changed
// last; else into a new row. std::invalid_argument on an empty document and on seq_len < 1.
PackedRows plan_window(const std::vector<Piece>& documents, int64_t seq_len);

}  // namespace ingot
