#include "core/token_store.h"

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

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw std::runtime_error("token file " + path + ": " + what);
}

int64_t file_size(int fd, const std::string& path) {
  struct stat info {};
  if (fstat(fd, &info) != 0) fail(path, std::string("cannot be examined: ") + std::strerror(errno));
  if (!S_ISREG(info.st_mode)) fail(path, "is not a regular file");
  return static_cast<int64_t>(info.st_size);
}

}  // namespace

TokenStore::TokenStore(const std::string& path, int item_size, int64_t n_tokens)
    : path_(path), item_size_(item_size), n_tokens_(n_tokens) {
  if (item_size != 2 && item_size != 4) fail(path, "item size must be 2 (uint16) or 4 (int32)");
  if (n_tokens < 1 || n_tokens > std::numeric_limits<int64_t>::max() / item_size)
    fail(path, "impossible token count " + std::to_string(n_tokens));
  // O_NONBLOCK: a named pipe is refused below instead of blocking the open.
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) fail(path, std::string("cannot be opened: ") + std::strerror(errno));
  try {
    const int64_t found = file_size(fd_, path), expected = n_tokens * item_size;
    if (found != expected)
      fail(path, "has " + std::to_string(found) + " bytes, expected " + std::to_string(expected) +
                     " (" + std::to_string(n_tokens) + " tokens of " + std::to_string(item_size) +
                     " bytes)");
    n_bytes_ = static_cast<size_t>(expected);
    void* map = mmap(nullptr, n_bytes_, PROT_READ, MAP_SHARED, fd_, 0);
    if (map == MAP_FAILED) fail(path, std::string("cannot be mapped: ") + std::strerror(errno));
    map_ = static_cast<const unsigned char*>(map);
  } catch (...) {
    close(fd_);
    throw;
  }
}

TokenStore::~TokenStore() {
  munmap(const_cast<unsigned char*>(map_), n_bytes_);
  close(fd_);
}

void TokenStore::read(int64_t start, int64_t count, void* out) const {
  // Written so that no sum can overflow.
  if (start < 0 || count < 0 || start > n_tokens_ || count > n_tokens_ - start)
    throw std::out_of_range("token file " + path_ + ": " + std::to_string(count) +
                            " tokens from " + std::to_string(start) + " lie outside its " +
                            std::to_string(n_tokens_) + " tokens");
  const auto width = static_cast<size_t>(item_size_);
  if (count > 0)
    std::memcpy(out, map_ + static_cast<size_t>(start) * width, static_cast<size_t>(count) * width);
}

void TokenStore::check_not_truncated() const {
  const int64_t found = file_size(fd_, path_);
  if (found < static_cast<int64_t>(n_bytes_))
    fail(path_, "was cut to " + std::to_string(found) + " bytes while in use, expected " +
                    std::to_string(n_bytes_));
}

}  // namespace ingot
