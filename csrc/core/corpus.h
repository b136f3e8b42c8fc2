// A corpus reads many token files as one sequence of tokens. Files are opened when first read, and
// closed when too many are open, least recently used first.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/sums.h"
#include "core/token_file.h"

namespace ingot {

// The open files of all corpora of a loader. Thread-safe.
class FileCache {
 public:
  // Half of the files that this process may open (ulimit -n), at least 8, at most 16,384: Linux
  // allows a process 65,530 maps.
  static size_t default_capacity();

  // Keeps at most `capacity` files open (and those that readers hold); at least 1, else
  // std::invalid_argument.
  explicit FileCache(size_t capacity = default_capacity());

  // Numbers for `files` more files: the first of them.
  uint64_t reserve(size_t files);

  // The file of this number, made by `open` if it is not open. Other threads do not wait for that.
  std::shared_ptr<const TokenFile> get(
      uint64_t number, const std::function<std::shared_ptr<const TokenFile>()>& open);

  size_t opened() const;  // files opened so far
  size_t held() const;    // files held open now

 private:
  struct Entry {
    uint64_t number;
    std::shared_ptr<const TokenFile> file;
  };

  const size_t capacity_;
  mutable std::mutex mutex_;  // guards what follows
  uint64_t reserved_ = 0;
  size_t opened_ = 0;
  std::list<Entry> recent_;  // last used first
  std::unordered_map<uint64_t, std::list<Entry>::iterator> entries_;
};

struct CorpusSpec {
  Format format;
  int item_size;                   // bytes of an id: 1, 2 or 4
  std::vector<std::string> paths;  // in order
  std::vector<int64_t> tokens;     // of each file
  int64_t vocab_size;              // ids lie below; at most 2^31
  std::string sums = {};           // of the file of checksums (BlockSums); empty: there is none
};

class Corpus {
 public:
  // Opens no file but that of sums. std::invalid_argument for a specification that no files can meet.
  Corpus(CorpusSpec spec, std::shared_ptr<FileCache> cache);

  int64_t size() const { return ends_.back(); }  // tokens of all files
  int item_size() const { return spec_.item_size; }
  int64_t vocab_size() const { return spec_.vocab_size; }

  // The reads of one batch by one thread. It holds the file last used, so that rows of one file
  // cost neither a lock nor a system call; a file is checked for truncation when a reader takes it.
  // The corpus must outlive it.
  class Reader {
   public:
    explicit Reader(const Corpus& corpus) : corpus_(&corpus) {}

    // Copies tokens [start, start + count) to `out`, as they are or as int64 (widen); `out` is
    // aligned to their size. std::out_of_range outside [0, size()); DamagedFile for a file that
    // TokenFile refuses, that was truncated, or that holds another checksum (BlockSums) or an id >=
    // vocab_size there (file, byte and what was found are named).
    void read(int64_t start, int64_t count, void* out, bool widen = false);

    // Where the tokens [start, start + count) lie, in the width of their file, if they were read just
    // now and all lie in one file; else null. Valid until the next read.
    const unsigned char* last_read(int64_t start, int64_t count) const noexcept {
      if (start < begin_ || start > end_ - count) return nullptr;
      return first_ + (start - begin_) * corpus_->spec_.item_size;
    }

    // Has the pages of a coming read fetched from the disk: without it each page is waited for in
    // turn, since nothing is read ahead. A system call or two, so not for what lies in memory.
    // Best effort: never throws.
    void will_need(int64_t start, int64_t count) noexcept;

    // Starts to load a coming row into the processor's cache, if it lies in the file at hand; two
    // to four rows ahead of read() this hides most of what the memory takes.
    void touch(int64_t start) const noexcept {
      if (start < begin_ || start >= end_) return;
      const unsigned char* row = first_ + (start - begin_) * corpus_->spec_.item_size;
      for (int line = 0; line < kTouchedLines; ++line) __builtin_prefetch(row + 64 * line);
    }

   private:
    static constexpr int kTouchedLines = 8;

    void take(size_t shard);
    [[noreturn]] void report(int64_t start, int64_t count) const;

    const Corpus* corpus_;
    std::shared_ptr<const TokenFile> file_;  // the file at hand, if any
    size_t shard_ = 0;                       // its number
    int64_t begin_ = 0, end_ = 0;            // its tokens in the corpus
    const unsigned char* first_ = nullptr;
  };

 private:
  size_t shard_of(int64_t token) const;
  std::shared_ptr<const TokenFile> open(size_t shard) const;

  const CorpusSpec spec_;
  const std::shared_ptr<FileCache> cache_;
  std::unique_ptr<BlockSums> sums_;  // null: no block is verified
  std::vector<int64_t> ends_;        // of each file, in tokens of the corpus
  uint64_t first_number_;            // of its files in the cache
};

}  // namespace ingot
