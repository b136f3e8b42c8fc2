// Checksums of the blocks of token files: a flipped bit is found when its block is first read.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/token_file.h"

namespace ingot {

// The hash XXH64 with seed 0 (Collet, xxHash), as of Python's xxhash and the command xxh64sum.
uint64_t xxh64(const unsigned char* data, size_t size) noexcept;

// The checksums of a corpus's files, and which blocks were found to have theirs. A file is cut from
// its first byte into blocks of 64 KiB and a last one of what is left. The file of sums holds the
// XXH64 of each block of each file, in order, as little-endian uint64. Thread-safe.
class BlockSums {
 public:
  static constexpr int64_t kBlock = 1 << 16;

  // path: of the file of sums. bytes: of each token file. Throws as File.
  BlockSums(const std::string& path, const std::vector<int64_t>& bytes);

  // Whether each block that bytes [begin, end) of a file lie in was found to have its sum.
  bool verified(size_t shard, int64_t begin, int64_t end) const noexcept;

  // Reads those blocks that were not. DamagedFile names the first that has another sum (its file,
  // byte, and both sums), each time that it is asked for.
  void verify(size_t shard, const TokenFile& file, int64_t begin, int64_t end);

 private:
  File sums_;
  std::vector<int64_t> first_;                   // sum of each file, counted from the first of all
  std::vector<std::atomic<uint64_t>> verified_;  // a bit for each block
};

}  // namespace ingot
