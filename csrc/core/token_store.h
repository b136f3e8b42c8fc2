// A file of token ids, mapped read-only. Every read is checked against the map.
#pragma once

#include <cstdint>
#include <string>

namespace ingot {

class TokenStore {
 public:
  // Maps `path`, which must hold exactly `n_tokens` ids of `item_size` bytes (2: uint16, 4: int32).
  // Throws std::runtime_error that says what was found and what was expected.
  TokenStore(const std::string& path, int item_size, int64_t n_tokens);
  ~TokenStore();
  TokenStore(const TokenStore&) = delete;
  TokenStore& operator=(const TokenStore&) = delete;

  int64_t size() const { return n_tokens_; }
  int item_size() const { return item_size_; }

  // Copies tokens [start, start + count) to `out`; throws std::out_of_range outside [0, size()].
  void read(int64_t start, int64_t count, void* out) const;

  // Throws std::runtime_error if the file became shorter than the map: a read past its new end
  // would end the process with SIGBUS. Called once per batch.
  void check_not_truncated() const;

 private:
  std::string path_;
  int item_size_;
  int64_t n_tokens_;
  size_t n_bytes_ = 0;
  int fd_ = -1;
  const unsigned char* map_ = nullptr;
};

}  // namespace ingot
