#include "core/packing.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <system_error>

#include "core/text.h"

namespace ingot {
namespace {

constexpr char kMagic[8] = {'I', 'N', 'G', 'O', 'T', 'P', 'L', 'N'};
constexpr uint64_t kVersion = 1;

struct Header {
  char magic[8];
  uint64_t version, seq_len, corpus_tokens, rows, pieces, piece_tokens;
};
static_assert(sizeof(Header) == 56 && sizeof(Piece) == 16, "as in the file");

}  // namespace

PackPlan::PackPlan(const std::string& path, int64_t seq_len, int64_t corpus_tokens)
    : file_(path), seq_len_(seq_len), corpus_tokens_(corpus_tokens) {
  if (seq_len < 1 || seq_len == std::numeric_limits<int64_t>::max() || corpus_tokens < 1)
    throw std::invalid_argument("a packing plan needs seq_len >= 1 and corpus_tokens >= 1");
  read_header();
  map_ = mmap(nullptr, n_bytes_, PROT_READ, MAP_SHARED, file_.descriptor(), 0);
  if (map_ == MAP_FAILED)
    throw std::system_error(errno, std::generic_category(), path + ": cannot be mapped");
  pieces_ = reinterpret_cast<const Piece*>(static_cast<const char*>(map_) + sizeof(Header));
  row_ends_ = reinterpret_cast<const int64_t*>(pieces_ + n_pieces_);
}

PackPlan::~PackPlan() { munmap(map_, n_bytes_); }

template <typename... Parts>
void PackPlan::fail(const Parts&... what) const {
  throw std::runtime_error(text("packing plan ", file_.path(), " ", what...));
}

void PackPlan::read_header() {
  n_bytes_ = static_cast<size_t>(file_.size());
  if (n_bytes_ < sizeof(Header))
    fail("has ", n_bytes_, " bytes, less than a header; it is truncated");
  Header header;
  file_.read(0, &header, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0)
    fail("does not begin with INGOTPLN as a packing plan does");
  const auto expect = [&](const char* what, uint64_t found, uint64_t expected) {
    if (found != expected)
      fail("is of ", what, " ", found, "; expected ", expected, "; prepare the data again");
  };
  expect("version", header.version, kVersion);
  expect("seq_len", header.seq_len, static_cast<uint64_t>(seq_len_));
  expect("a corpus of tokens", header.corpus_tokens, static_cast<uint64_t>(corpus_tokens_));
  // The pieces are bounded first, so that no sum or product can overflow.
  if (header.rows < 1 || header.rows > header.pieces || header.pieces > n_bytes_ / sizeof(Piece) ||
      n_bytes_ != sizeof(Header) + header.pieces * sizeof(Piece) + header.rows * sizeof(int64_t))
    fail("has ", n_bytes_, " bytes, which cannot be ", header.rows, " rows of ", header.pieces,
         " pieces; it is truncated or damaged");
  uint64_t slots = 0;
  if (__builtin_mul_overflow(header.rows, header.seq_len + 1, &slots) ||
      header.piece_tokens < header.corpus_tokens || header.piece_tokens > slots)
    fail("has ", header.piece_tokens, " tokens in ", header.rows,
         " rows, which cannot be a corpus of ", header.corpus_tokens, "; it is damaged");
  rows_ = static_cast<int64_t>(header.rows);
  n_pieces_ = static_cast<int64_t>(header.pieces);
}

Pieces PackPlan::pieces(int64_t row) const {
  if (row < 0 || row >= rows_)
    throw std::out_of_range(
        text("packing plan ", file_.path(), ": row ", row, " lies outside its ", rows_, " rows"));
  const int64_t first = row == 0 ? 0 : row_ends_[row - 1], last = row_ends_[row];
  if (first < 0 || first >= last || last > n_pieces_)
    fail("is damaged: row ", row, " has pieces ", first, " to ", last, " of ", n_pieces_);
  int64_t free = seq_len_ + 1;
  for (int64_t i = first; i < last; ++i) {
    const Piece& piece = pieces_[i];
    if (piece.tokens < 1 || piece.tokens > free || piece.start < 0 ||
        piece.start > corpus_tokens_ - piece.tokens)
      fail("is damaged at byte ", sizeof(Header) + static_cast<size_t>(i) * sizeof(Piece), ": row ", row,
           " has ", piece.tokens, " tokens from ", piece.start, " on, which do not fit ", free,
           " free slots and a corpus of ", corpus_tokens_, " tokens");
    free -= piece.tokens;
  }
  return {pieces_ + first, pieces_ + last};
}

int64_t PackPlan::targets(int64_t row) const {
  int64_t targets = 0;
  for (const Piece& piece : pieces(row)) targets += piece.tokens - 1;
  return targets;
}

void PackPlan::check_not_truncated() const {
  const int64_t found = file_.size();
  if (found < static_cast<int64_t>(n_bytes_))
    fail("was cut to ", found, " bytes while in use; expected ", n_bytes_);
}

}  // namespace ingot
