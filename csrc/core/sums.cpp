#include "core/sums.h"

#include <algorithm>
#include <cstring>
#include <ios>

#include "core/text.h"

namespace ingot {
namespace {

constexpr uint64_t kPrimes[] = {0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
                                0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5};

constexpr char kAdvice[] =
    "restore the file from its source, or run python launch/prepare_data.py again with another data.path";

uint64_t rotated(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

uint64_t mixed(uint64_t lane, uint64_t word) {
  return rotated(lane + word * kPrimes[1], 31) * kPrimes[0];
}

template <typename Word>
uint64_t take(const unsigned char*& data) {
  Word word;
  std::memcpy(&word, data, sizeof word);
  data += sizeof word;
  return word;
}

int64_t blocks_of(int64_t bytes) { return (bytes + BlockSums::kBlock - 1) / BlockSums::kBlock; }

int64_t total(const std::vector<int64_t>& bytes) {
  int64_t sum = 0;
  for (const int64_t n : bytes) sum += blocks_of(n);
  return sum;
}

}  // namespace

uint64_t xxh64(const unsigned char* data, size_t size) noexcept {
  const unsigned char* const end = data + size;
  uint64_t hash = kPrimes[4];
  if (size >= 32) {
    uint64_t lanes[] = {kPrimes[0] + kPrimes[1], kPrimes[1], 0, -kPrimes[0]};
    for (const unsigned char* last = end - 32; data <= last;)
      for (uint64_t& lane : lanes) lane = mixed(lane, take<uint64_t>(data));
    hash = rotated(lanes[0], 1) + rotated(lanes[1], 7) + rotated(lanes[2], 12) + rotated(lanes[3], 18);
    for (const uint64_t lane : lanes) hash = (hash ^ mixed(0, lane)) * kPrimes[0] + kPrimes[3];
  }
  hash += size;
  while (end - data >= 8)
    hash = rotated(hash ^ mixed(0, take<uint64_t>(data)), 27) * kPrimes[0] + kPrimes[3];
  if (end - data >= 4)
    hash = rotated(hash ^ take<uint32_t>(data) * kPrimes[0], 23) * kPrimes[1] + kPrimes[2];
  while (data < end) hash = rotated(hash ^ take<uint8_t>(data) * kPrimes[4], 11) * kPrimes[0];
  hash = (hash ^ hash >> 33) * kPrimes[1];
  hash = (hash ^ hash >> 29) * kPrimes[2];
  return hash ^ hash >> 32;
}

BlockSums::BlockSums(const std::string& path, const std::vector<int64_t>& bytes)
    : sums_(path), verified_(static_cast<size_t>(total(bytes) / 64 + 1)) {
  int64_t first = 0;
  for (const int64_t n : bytes) {
    first_.push_back(first);
    first += blocks_of(n);
  }
}

bool BlockSums::verified(size_t shard, int64_t begin, int64_t end) const noexcept {
  const int64_t first = first_[shard];
  for (int64_t i = first + begin / kBlock; i < first + blocks_of(end); ++i)
    if (!(verified_[static_cast<size_t>(i / 64)].load(std::memory_order_relaxed) >> i % 64 & 1))
      return false;
  return true;
}

void BlockSums::verify(size_t shard, const TokenFile& file, int64_t begin, int64_t end) {
  if (verified(shard, begin, end)) return;
  for (int64_t at = begin / kBlock * kBlock; at < end; at += kBlock) {
    if (verified(shard, at, at + 1)) continue;
    const int64_t size = std::min(kBlock, file.bytes() - at), i = first_[shard] + at / kBlock;
    uint64_t expected;
    sums_.read(8 * i, &expected, sizeof expected);
    const uint64_t found = xxh64(file.data() + at, static_cast<size_t>(size));
    if (found != expected)
      throw DamagedFile(text(file.path(), ": the ", size, " bytes from byte ", at, " on have the xxh64 ",
                             std::hex, found, ", expected ", expected, " (", sums_.path(), "): ", kAdvice));
    verified_[static_cast<size_t>(i / 64)].fetch_or(uint64_t{1} << i % 64, std::memory_order_relaxed);
  }
}

}  // namespace ingot
