#include "core/packing.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace ingot {
namespace {

constexpr char kMagic[8] = {'I', 'N', 'G', 'O', 'T', 'P', 'L', 'N'};
constexpr uint64_t kVersion = 1;
constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

struct Header {
  char magic[8];
  uint64_t version, seq_len, corpus_tokens, rows, pieces, piece_tokens;
};
static_assert(sizeof(Header) == 56 && sizeof(Piece) == 16, "as in the file");

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error("packing plan " + path + ": " + what);
}

size_t file_size(int fd, const std::string& path) {
  struct stat info {};
  if (fstat(fd, &info) != 0) fail(path, std::string("cannot be examined: ") + std::strerror(errno));
  if (!S_ISREG(info.st_mode)) fail(path, "is not a regular file");
  return static_cast<size_t>(info.st_size);
}

}  // namespace

PackPlan::PackPlan(const std::string& path, int64_t seq_len, int64_t corpus_tokens)
    : path_(path), seq_len_(seq_len), corpus_tokens_(corpus_tokens) {
  if (seq_len < 1 || seq_len == kLargest || corpus_tokens < 1)
    throw std::invalid_argument("a packing plan needs seq_len >= 1 and corpus_tokens >= 1");
  // O_NONBLOCK: a named pipe is refused below instead of blocking the open.
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) fail(path, std::string("cannot be opened: ") + std::strerror(errno));
  try {
    n_bytes_ = file_size(fd_, path);
    if (n_bytes_ < sizeof(Header))
      fail(path, "has " + std::to_string(n_bytes_) + " bytes, less than a header; it is truncated");
    void* map = mmap(nullptr, n_bytes_, PROT_READ, MAP_SHARED, fd_, 0);
    if (map == MAP_FAILED) fail(path, std::string("cannot be mapped: ") + std::strerror(errno));
    map_ = static_cast<const unsigned char*>(map);
    read_header();
  } catch (...) {
    if (map_ != nullptr) munmap(const_cast<unsigned char*>(map_), n_bytes_);
    close(fd_);
    throw;
  }
}

PackPlan::~PackPlan() {
  munmap(const_cast<unsigned char*>(map_), n_bytes_);
  close(fd_);
}

void PackPlan::read_header() {
  Header header;
  std::memcpy(&header, map_, sizeof(header));
  const auto expect = [&](uint64_t found, uint64_t expected, const std::string& what) {
    if (found != expected)
      fail(path_, "is of " + what + " " + std::to_string(found) + ", expected " +
                      std::to_string(expected) + "; prepare the data again");
  };
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) fail(path_, "is not a packing plan");
  expect(header.version, kVersion, "version");
  expect(header.seq_len, static_cast<uint64_t>(seq_len_), "sequence length");
  expect(header.corpus_tokens, static_cast<uint64_t>(corpus_tokens_), "a corpus of tokens");
  // Bounded first, so that no sum or product below can overflow.
  const uint64_t most = n_bytes_ / sizeof(Piece);
  if (header.rows < 1 || header.rows > header.pieces || header.pieces > most ||
      n_bytes_ != sizeof(Header) + header.pieces * sizeof(Piece) + header.rows * sizeof(int64_t))
    fail(path_, "has " + std::to_string(n_bytes_) + " bytes, which cannot be " +
                    std::to_string(header.rows) + " rows of " + std::to_string(header.pieces) +
                    " pieces; it is truncated or damaged");
  uint64_t slots = 0;
  if (__builtin_mul_overflow(header.rows, header.seq_len + 1, &slots) ||
      header.piece_tokens < header.corpus_tokens || header.piece_tokens > slots)
    fail(path_, std::to_string(header.piece_tokens) + " tokens in " + std::to_string(header.rows) +
                    " rows cannot be a corpus of " + std::to_string(header.corpus_tokens) +
                    "; it is damaged");
  rows_ = static_cast<int64_t>(header.rows);
  n_pieces_ = static_cast<int64_t>(header.pieces);
  pieces_ = reinterpret_cast<const Piece*>(map_ + sizeof(Header));
  row_ends_ = reinterpret_cast<const int64_t*>(pieces_ + n_pieces_);
}

Pieces PackPlan::pieces(int64_t row) const {
  if (row < 0 || row >= rows_)
    throw std::out_of_range("packing plan " + path_ + ": row " + std::to_string(row) +
                            " lies outside its " + std::to_string(rows_) + " rows");
  const int64_t first = row == 0 ? 0 : row_ends_[row - 1], last = row_ends_[row];
  if (first < 0 || first >= last || last > n_pieces_)
    fail(path_, "row " + std::to_string(row) + " has pieces " + std::to_string(first) + " to " +
                    std::to_string(last) + " of " + std::to_string(n_pieces_) + "; it is damaged");
  int64_t free = seq_len_ + 1;
  for (int64_t i = first; i < last; ++i) {
    const Piece& piece = pieces_[i];
    if (piece.tokens < 1 || piece.tokens > free || piece.start < 0 ||
        piece.tokens > corpus_tokens_ || piece.start > corpus_tokens_ - piece.tokens)
      fail(path_, "row " + std::to_string(row) + ": a piece of " + std::to_string(piece.tokens) +
                      " tokens from " + std::to_string(piece.start) + " on does not fit " +
                      std::to_string(free) + " free slots and a corpus of " +
                      std::to_string(corpus_tokens_) + " tokens; it is damaged at byte " +
                      std::to_string(sizeof(Header) + static_cast<size_t>(i) * sizeof(Piece)));
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
  const size_t found = file_size(fd_, path_);
  if (found < n_bytes_)
    fail(path_, "was cut to " + std::to_string(found) + " bytes while in use, expected " +
                    std::to_string(n_bytes_));
}

}  // namespace ingot
