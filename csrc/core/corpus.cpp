#include "core/corpus.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "core/clones.h"
#include "core/text.h"

namespace ingot {
namespace {

// Copies and returns the largest id, all in one pass over memory. A negative int32 is a large one.
template <typename Id, typename Out>
INGOT_INLINE Id copy_part(const Id* __restrict from, int64_t count, Out* __restrict to, Id largest) {
  for (int64_t i = 0; i < count; ++i) {
    const Id id = from[i];
    to[i] = id;
    largest = id > largest ? id : largest;
  }
  return largest;
}

// The processor foresees reads within a page of 4 KB alone, so that a long row would wait for each
// of its pages: it is told of the next one while this one is copied.
template <typename Id, typename Out>
INGOT_INLINE uint32_t copy_ids(const Id* __restrict from, int64_t count, Out* __restrict to) {
  constexpr int64_t kLine = 64 / sizeof(Id), kBlock = 16 * kLine, kAhead = 4 * kBlock;
  const int64_t head = before_line(to, count);
  Id largest = copy_part<Id, Out>(from, head, to, 0);
  from += head, to += head, count -= head;
  for (; count > kAhead; count -= kBlock, from += kBlock, to += kBlock) {
    for (int64_t i = 0; i < kBlock; i += kLine)
      __builtin_prefetch(from + kAhead + i, 0, 2);  // 2: not into the smallest cache
    largest = copy_part(from, kBlock, at_line(to), largest);
  }
  return count > 0 ? copy_part(from, count, at_line(to), largest) : largest;
}

// A template cannot have clones itself.
#define INGOT_COPY(name, Id, Out)                                                 \
  INGOT_VECTOR_CLONES uint32_t name(const Id* from, int64_t count, Out* to) {     \
    return copy_ids(from, count, to);                                             \
  }
INGOT_COPY(copy8, uint8_t, uint8_t)
INGOT_COPY(copy16, uint16_t, uint16_t)
INGOT_COPY(copy32, uint32_t, uint32_t)
INGOT_COPY(widen8, uint8_t, int64_t)
INGOT_COPY(widen16, uint16_t, int64_t)
INGOT_COPY(widen32, uint32_t, int64_t)
#undef INGOT_COPY

uint32_t copy_ids(const unsigned char* from, int item_size, int64_t count, void* to, bool widen) {
  const auto run = [&](auto id, auto copy, auto widened) {
    const auto* ids = reinterpret_cast<const decltype(id)*>(from);
    return widen ? widened(ids, count, static_cast<int64_t*>(to))
                 : copy(ids, count, static_cast<decltype(id)*>(to));
  };
  if (item_size == 1) return run(uint8_t{}, copy8, widen8);
  if (item_size == 2) return run(uint16_t{}, copy16, widen16);
  return run(uint32_t{}, copy32, widen32);
}

}  // namespace

size_t FileCache::default_capacity() {
  constexpr rlim_t kLeast = 8, kMost = 16384;
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return kLeast;
  return static_cast<size_t>(std::clamp(limit.rlim_cur / 2, kLeast, kMost));
}

FileCache::FileCache(size_t capacity) : capacity_(capacity) {
  if (capacity < 1) throw std::invalid_argument("a file cache holds at least 1 file");
}

uint64_t FileCache::reserve(size_t files) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(reserved_, reserved_ + files);
}

std::shared_ptr<const TokenFile> FileCache::get(
    uint64_t number, const std::function<std::shared_ptr<const TokenFile>()>& open) {
  const auto find = [&]() -> std::shared_ptr<const TokenFile> {
    const auto found = entries_.find(number);
    if (found == entries_.end()) return nullptr;
    recent_.splice(recent_.begin(), recent_, found->second);
    return found->second->file;
  };
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (auto file = find()) return file;
  }
  auto file = open();
  std::list<Entry> closing;  // destroyed, and so unmapped, after the lock was released
  const std::lock_guard<std::mutex> lock(mutex_);
  ++opened_;
  if (auto other = find()) return other;  // another thread was faster
  recent_.push_front({number, file});
  entries_[number] = recent_.begin();
  if (recent_.size() > capacity_) {
    entries_.erase(recent_.back().number);
    closing.splice(closing.begin(), recent_, std::prev(recent_.end()));
  }
  return file;
}

size_t FileCache::opened() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return opened_;
}

size_t FileCache::held() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return recent_.size();
}

Corpus::Corpus(CorpusSpec spec, std::shared_ptr<FileCache> cache)
    : spec_(std::move(spec)), cache_(std::move(cache)) {
  if (spec_.paths.empty() || spec_.paths.size() != spec_.tokens.size())
    throw std::invalid_argument(text("a corpus needs files and the token count of each; found ",
                                     spec_.paths.size(), " files and ", spec_.tokens.size(), " counts"));
  if (spec_.vocab_size < 1 || spec_.vocab_size > int64_t{1} << 31)
    throw std::invalid_argument(text("vocab_size ", spec_.vocab_size, "; expected 1 to 2^31"));
  ends_.reserve(spec_.tokens.size());
  int64_t end = 0, bytes = 0;
  std::vector<int64_t> file_bytes;
  for (size_t i = 0; i < spec_.tokens.size(); ++i) {
    check_token_file(spec_.paths[i], spec_.format, spec_.item_size, spec_.tokens[i]);
    if (__builtin_add_overflow(end, spec_.tokens[i], &end) ||
        __builtin_mul_overflow(end, spec_.item_size, &bytes))
      throw std::invalid_argument(spec_.paths[i] + ": the corpus is too large");
    ends_.push_back(end);
    file_bytes.push_back(bytes_of(spec_.format, spec_.item_size, spec_.tokens[i]));
  }
  if (!spec_.sums.empty()) sums_ = std::make_unique<BlockSums>(spec_.sums, file_bytes);
  first_number_ = cache_->reserve(spec_.paths.size());
}

size_t Corpus::shard_of(int64_t token) const {
  return static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), token) - ends_.begin());
}

std::shared_ptr<const TokenFile> Corpus::open(size_t shard) const {
  return cache_->get(first_number_ + shard, [this, shard] {
    return std::make_shared<const TokenFile>(spec_.paths[shard], spec_.format, spec_.item_size,
                                             spec_.tokens[shard]);
  });
}

void Corpus::Reader::take(size_t shard) {
  auto file = corpus_->open(shard);
  file->check_not_truncated();
  file_ = std::move(file);
  shard_ = shard;
  begin_ = shard == 0 ? 0 : corpus_->ends_[shard - 1];
  end_ = corpus_->ends_[shard];
  first_ = file_->tokens();
}

void Corpus::Reader::read(int64_t start, int64_t count, void* out, bool widen) {
  // Written so that no sum can overflow.
  if (start < 0 || count < 0 || start > corpus_->size() || count > corpus_->size() - start)
    throw std::out_of_range(text(count, " tokens from ", start, " lie outside the ", corpus_->size(),
                                 " tokens of the corpus"));
  const int size = corpus_->spec_.item_size;
  auto* to = static_cast<unsigned char*>(out);
  while (count > 0) {
    if (start < begin_ || start >= end_) take(corpus_->shard_of(start));
    const int64_t part = std::min(count, end_ - start);
    const int64_t at = start - begin_;
    if (corpus_->sums_)
      corpus_->sums_->verify(shard_, *file_, file_->byte_of(at), file_->byte_of(at + part));
    const unsigned char* from = first_ + at * size;
    if (copy_ids(from, size, part, to, widen) >= corpus_->spec_.vocab_size) report(start, part);
    start += part;
    count -= part;
    to += part * (widen ? 8 : size);
  }
}

// Names the first id that is too large among `count` of the file at hand.
void Corpus::Reader::report(int64_t start, int64_t count) const {
  const auto size = static_cast<size_t>(corpus_->spec_.item_size);
  const unsigned char* at = first_ + (start - begin_) * corpus_->spec_.item_size;
  uint32_t id = 0;
  for (int64_t i = 0; i < count && id < corpus_->spec_.vocab_size; ++i, ++start, at += size)
    std::memcpy(&id, at, size);
  throw DamagedFile(text(file_->path(), ": the id at byte ", file_->byte_of(start - 1 - begin_), " is ",
                         id, ", expected ids below ", corpus_->spec_.vocab_size));
}

void Corpus::Reader::will_need(int64_t start, int64_t count) noexcept {
  if (start < 0 || count < 0 || start > corpus_->size() || count > corpus_->size() - start) return;
  try {
    while (count > 0) {
      const size_t shard = corpus_->shard_of(start);
      const int64_t begin = shard == 0 ? 0 : corpus_->ends_[shard - 1];
      const int64_t part = std::min(count, corpus_->ends_[shard] - start);
      const auto file = corpus_->open(shard);
      int64_t from = file->byte_of(start - begin), to = file->byte_of(start - begin + part);
      if (corpus_->sums_ && !corpus_->sums_->verified(shard, from, to)) {  // whole blocks will be read
        from = from / BlockSums::kBlock * BlockSums::kBlock;
        to = std::min(file->bytes(), (to - 1) / BlockSums::kBlock * BlockSums::kBlock + BlockSums::kBlock);
      }
      file->will_need(from, to);
      start += part;
      count -= part;
    }
  } catch (...) {  // the read itself will say what is wrong
  }
}

}  // namespace ingot
