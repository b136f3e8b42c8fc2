// One file of token ids, mapped read-only and not converted. The formats, all of them
// little-endian:
//   raw        <name>.bin: ids alone (nanoGPT)
//   megatron   <name>.bin: ids alone; <name>.idx says where each document lies
//   llm.c      <name>.bin: a header of 256 int32 (magic, version, count), then ids
//   datatrove  <name>.ds: ids alone; <name>.ds.index holds where each document ends, uint64
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ingot {

enum class Format { raw, megatron, llmc, datatrove };

// The format called "raw", "megatron", "llm.c" or "datatrove"; else std::invalid_argument.
Format format_named(const std::string& name);

// A file is missing, cannot be read, or is not what its corpus says of it. The message names the
// file, the byte where there is one, what was found and what was expected.
struct DamagedFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws std::invalid_argument where no file of the format can hold `n_tokens` ids of `item_size`
// bytes under this name. Touches no file.
void check_token_file(const std::string& path, Format format, int item_size, int64_t n_tokens);

// The bytes of such a file.
int64_t bytes_of(Format format, int item_size, int64_t n_tokens);

// A regular file, open for reading. Throws DamagedFile; std::system_error when the machine has no
// more files to open, which says nothing of this one.
class File {
 public:
  explicit File(std::string path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  const std::string& path() const { return path_; }
  int descriptor() const { return fd_; }
  int64_t size() const;  // in bytes, now
  void read(int64_t offset, void* out, size_t count) const;

 private:
  std::string path_;
  int fd_ = -1;
};

class TokenFile {
 public:
  // Opens `path` and checks, in constant time, its header or index and its size: they must say
  // `n_tokens` ids of `item_size` bytes (1, 2 or 4). std::invalid_argument as
  // check_token_file, DamagedFile where the file is not so, std::system_error as File.
  TokenFile(const std::string& path, Format format, int item_size, int64_t n_tokens);
  ~TokenFile();
  TokenFile(const TokenFile&) = delete;
  TokenFile& operator=(const TokenFile&) = delete;

  const std::string& path() const { return file_.path(); }
  int64_t size() const { return n_tokens_; }
  const unsigned char* tokens() const { return map_ + header_; }  // aligned to the item size
  const unsigned char* data() const { return map_; }  // all bytes of the file
  int64_t bytes() const { return n_bytes_; }
  int64_t byte_of(int64_t token) const { return header_ + token * item_size_; }  // in the file

  // Throws DamagedFile if the file became shorter than the map: a read past its new end would end
  // the process with SIGBUS.
  void check_not_truncated() const;

  // Has bytes [begin, end), which must lie in the file, read ahead.
  void will_need(int64_t begin, int64_t end) const noexcept;

 private:
  File file_;
  int item_size_;
  int64_t n_tokens_;
  int64_t header_;  // bytes before the first token
  int64_t n_bytes_;
  const unsigned char* map_;
};

}  // namespace ingot
