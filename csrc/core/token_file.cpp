#include "core/token_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <limits>
#include <system_error>
#include <utility>

#include "core/text.h"

namespace ingot {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are little-endian");

constexpr int64_t kLlmcHeader = 256 * 4;
constexpr int64_t kMegatronHeader = 34;
constexpr char kMegatronMagic[] = "MMIDIDX\0";  // with the literal's own end: 9 bytes

template <typename... Parts>
[[noreturn]] void fail(const File& file, const Parts&... what) {
  throw DamagedFile(text(file.path(), ": ", what...));
}

// Compares the `Number` at `offset` with what it must be.
template <typename Number>
void expect(const File& file, int64_t offset, const char* name, int64_t expected) {
  Number number;
  file.read(offset, &number, sizeof number);
  const auto found = static_cast<int64_t>(number);  // of 2^63 or more: negative, never expected
  if (found != expected)
    fail(file, name, " at byte ", offset, " is ", found, ", expected ", expected);
}

void expect_size(const File& file, int64_t header, int item_size, int64_t n_tokens) {
  const int64_t found = file.size(), expected = header + n_tokens * item_size;
  if (found != expected)
    fail(file, "has ", found, " bytes, expected ", expected, " (", n_tokens, " tokens of ", item_size,
         " bytes)");
}

void check_llmc(const File& file, int item_size, int64_t n_tokens) {
  expect<int32_t>(file, 0, "the magic number", item_size == 2 ? 20240520 : 20240801);
  expect<int32_t>(file, 4, "the version", item_size == 2 ? 1 : 7);
  expect<int32_t>(file, 8, "the count of tokens", n_tokens);
}

// The .idx file: magic (9 bytes), version u64, dtype code u8, sequence count S u64, boundary count
// D u64, lengths int32[S] in tokens, offsets int64[S] in bytes, boundaries int64[D] in sequences.
void check_megatron(const std::string& path, int item_size, int64_t n_tokens) {
  const File file(path.substr(0, path.size() - 4) + ".idx");
  char magic[sizeof kMegatronMagic];
  file.read(0, magic, sizeof magic);
  if (std::memcmp(magic, kMegatronMagic, sizeof magic) != 0)
    fail(file, "does not begin with MMIDIDX as an index of Megatron does");
  expect<uint64_t>(file, 9, "the version", 1);
  int64_t counts[2], lengths, boundaries, size;
  file.read(18, counts, sizeof counts);
  const int64_t sequences = counts[0];
  if (sequences < 1 || counts[1] < 2)
    fail(file, "holds no document: ", sequences, " sequences and ", counts[1],
         " boundaries at byte 18");
  if (__builtin_mul_overflow(sequences, 12, &lengths) ||
      __builtin_mul_overflow(counts[1], 8, &boundaries) ||
      __builtin_add_overflow(lengths, boundaries, &size) ||
      __builtin_add_overflow(size, kMegatronHeader, &size) || size != file.size())
    fail(file, "has ", file.size(), " bytes, which is not what its ", sequences, " sequences and ",
         counts[1], " boundaries take");
  expect<uint8_t>(file, 17, "the dtype code", item_size == 1 ? 1 : item_size == 2 ? 8 : 4);
  const int64_t offsets_at = kMegatronHeader + 4 * sequences;
  const int64_t bounds_at = offsets_at + 8 * sequences;
  int32_t last;
  file.read(offsets_at - 4, &last, sizeof last);
  if (last < 0 || last > n_tokens)
    fail(file, "the last sequence, at byte ", offsets_at - 4, ", has ", last, " of ", n_tokens,
         " tokens");
  expect<int64_t>(file, offsets_at, "the first offset", 0);
  expect<int64_t>(file, bounds_at - 8, "the last offset", (n_tokens - last) * item_size);
  expect<int64_t>(file, bounds_at, "the first boundary", 0);
  expect<int64_t>(file, size - 8, "the last boundary", sequences);
}

void check_datatrove(const std::string& path, int64_t n_tokens) {
  const File file(path + ".index");
  const int64_t size = file.size();
  if (size < 8 || size % 8 != 0) fail(file, "has ", size, " bytes, expected 8 for each document");
  expect<uint64_t>(file, size - 8, "the end of the last document", n_tokens);
}

// `path`, once it and the rest are known to be possible.
const std::string& checked(const std::string& path, Format format, int item_size,
                           int64_t n_tokens) {
  check_token_file(path, format, item_size, n_tokens);
  return path;
}

}  // namespace

Format format_named(const std::string& name) {
  if (name == "raw") return Format::raw;
  if (name == "megatron") return Format::megatron;
  if (name == "llm.c") return Format::llmc;
  if (name == "datatrove") return Format::datatrove;
  throw std::invalid_argument(
      text("format \"", name, "\"; expected raw, megatron, llm.c or datatrove"));
}

void check_token_file(const std::string& path, Format format, int item_size, int64_t n_tokens) {
  const bool any_width = format == Format::raw || format == Format::megatron;
  if (item_size != 2 && item_size != 4 && !(item_size == 1 && any_width))
    throw std::invalid_argument(text(path, ": ids of ", item_size, " bytes; expected ",
                                     any_width ? "1, 2 or 4" : "2 or 4"));
  if (n_tokens < 1 || n_tokens > (std::numeric_limits<int64_t>::max() - kLlmcHeader) / item_size)
    throw std::invalid_argument(text(path, ": impossible token count ", n_tokens));
  const bool bin = path.size() >= 4 && path.compare(path.size() - 4, 4, ".bin") == 0;
  if (format == Format::megatron && !bin)
    throw std::invalid_argument(path + ": a token file of Megatron ends in .bin");
}

int64_t bytes_of(Format format, int item_size, int64_t n_tokens) {
  return (format == Format::llmc ? kLlmcHeader : 0) + n_tokens * item_size;
}

File::File(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: a named pipe is refused below instead of blocking the open.
  fd_ = open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ >= 0) {
    struct stat info {};
    if (fstat(fd_, &info) == 0 && S_ISREG(info.st_mode)) return;
    close(fd_);
    fail(*this, "is not a regular file");
  }
  if (errno == EMFILE || errno == ENFILE || errno == ENOMEM)
    throw std::system_error(errno, std::generic_category(), path_ + ": cannot be opened");
  fail(*this, "cannot be opened: ", std::strerror(errno));
}

File::~File() { close(fd_); }

int64_t File::size() const {
  struct stat info {};
  if (fstat(fd_, &info) != 0) fail(*this, "cannot be examined: ", std::strerror(errno));
  return static_cast<int64_t>(info.st_size);
}

void File::read(int64_t offset, void* out, size_t count) const {
  const ssize_t found = pread(fd_, out, count, static_cast<off_t>(offset));
  if (found == static_cast<ssize_t>(count)) return;
  fail(*this, "cannot be read at byte ", offset, ": ",
       found < 0 ? std::strerror(errno) : "it ends there, truncated");
}

TokenFile::TokenFile(const std::string& path, Format format, int item_size, int64_t n_tokens)
    : file_(checked(path, format, item_size, n_tokens)),
      item_size_(item_size),
      n_tokens_(n_tokens),
      header_(bytes_of(format, item_size, 0)),
      n_bytes_(bytes_of(format, item_size, n_tokens)) {
  expect_size(file_, header_, item_size, n_tokens);
  if (format == Format::llmc) check_llmc(file_, item_size, n_tokens);
  if (format == Format::megatron) check_megatron(path, item_size, n_tokens);
  if (format == Format::datatrove) check_datatrove(path, n_tokens);
  void* map = mmap(nullptr, static_cast<size_t>(n_bytes_), PROT_READ, MAP_SHARED,
                   file_.descriptor(), 0);
  if (map == MAP_FAILED)
    throw std::system_error(errno, std::generic_category(), path + ": cannot be mapped");
  // Rows lie anywhere: without this, each that is not in memory has megabytes around it read too.
  madvise(map, static_cast<size_t>(n_bytes_), MADV_RANDOM);
  map_ = static_cast<const unsigned char*>(map);
}

TokenFile::~TokenFile() {
  munmap(const_cast<unsigned char*>(map_), static_cast<size_t>(n_bytes_));
}

void TokenFile::check_not_truncated() const {
  const int64_t found = file_.size();
  if (found < n_bytes_)
    fail(file_, "was cut to ", found, " bytes while in use, expected ", n_bytes_);
}

void TokenFile::will_need(int64_t begin, int64_t end) const noexcept {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t from = begin / page * page;
  madvise(const_cast<unsigned char*>(map_) + from, static_cast<size_t>(end - from), MADV_WILLNEED);
}

}  // namespace ingot
