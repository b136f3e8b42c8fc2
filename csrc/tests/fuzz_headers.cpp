// A libFuzzer target over the headers and indexes of token files, and packing plans. `make fuzz`
// (tests/data/test_data_fuzz.py) builds it with the sanitizers and runs it:
//   clang++ -fsanitize=fuzzer,address,undefined -Icsrc csrc/core/{token_file,corpus,packing,sums}.cpp <this>
//
// An input: format (or 4: a plan), item size (of a plan: T) and vocabulary (1 byte each), the claimed
// count of tokens (8), the size of the token file (2), the token file, then its index file to the end.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/corpus.h"
#include "core/packing.h"
#include "core/token_file.h"
#include "must.h"

using namespace ingot;
using Bytes = std::vector<uint8_t>;

namespace {

struct Case {
  bool is_plan;
  Format format;
  int item_size;
  int64_t seq_len, vocab_size, n_tokens;
  Bytes file, index;

  Case(const uint8_t* data, size_t size) {
    const auto take = [&](void* out, size_t count) {
      const size_t have = std::min(count, size);
      std::memset(out, 0, count);
      std::memcpy(out, data, have);
      data += have;
      size -= have;
    };
    uint8_t kind[3];
    uint16_t length;
    take(kind, sizeof kind);
    take(&n_tokens, sizeof n_tokens);
    take(&length, sizeof length);
    constexpr int kSizes[] = {1, 2, 4};
    is_plan = kind[0] % 5 == 4;
    format = static_cast<Format>(kind[0] % 5 % 4);
    seq_len = kind[1];
    item_size = kSizes[kind[1] % 3];
    vocab_size = int64_t{1} << (kind[2] % 32);
    const size_t have = std::min<size_t>(length, size);
    file.assign(data, data + have);
    index.assign(data + have, data + size);
  }

  int64_t header() const { return format == Format::llmc ? 1024 : 0; }

  // The id of token `i`, read without the code under test.
  int64_t id(int64_t i) const {
    uint32_t id = 0;
    std::memcpy(&id, file.data() + header() + i * item_size, static_cast<size_t>(item_size));
    return id;
  }

  template <typename Number>
  Number in_index(size_t offset) const {
    MUST(offset + sizeof(Number) <= index.size());
    Number number;
    std::memcpy(&number, index.data() + offset, sizeof number);
    return number;
  }
};

void write(const std::string& path, const Bytes& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

// What an accepted file must be like, whatever its bytes.
void check_accepted(const Case& c) {
  MUST(static_cast<int64_t>(c.file.size()) == c.header() + c.n_tokens * c.item_size);
  if (c.format == Format::megatron) {
    const auto sequences = c.in_index<uint64_t>(18), boundaries = c.in_index<uint64_t>(26);
    MUST(c.index.size() == 34 + 12 * sequences + 8 * boundaries);
    const auto last = c.in_index<int32_t>(34 + 4 * sequences - 4);
    const auto offset = c.in_index<int64_t>(34 + 12 * sequences - 8);
    MUST(last >= 0 && offset + last * int64_t{c.item_size} == c.n_tokens * c.item_size);
    MUST(c.in_index<uint64_t>(c.index.size() - 8) == sequences);
  }
  if (c.format == Format::datatrove)
    MUST(c.index.size() % 8 == 0 && c.in_index<int64_t>(c.index.size() - 8) == c.n_tokens);
}

// Reads the file, twice over as one corpus: each id as it is, or a refusal where one is too large.
void check_reads(const Case& c, const std::string& path) {
  const CorpusSpec spec{
      c.format, c.item_size, {path, path}, {c.n_tokens, c.n_tokens}, c.vocab_size};
  const Corpus corpus(spec, std::make_shared<FileCache>(1));
  Corpus::Reader reader(corpus);
  const int64_t starts[] = {0, c.n_tokens - 1, c.n_tokens / 2}, size = corpus.size();
  for (const int64_t start : starts) {
    const int64_t count = std::min(c.n_tokens + 1, size - start);
    Bytes out(static_cast<size_t>(count * c.item_size));
    bool fits = true;
    for (int64_t i = 0; i < count; ++i) fits &= c.id((start + i) % c.n_tokens) < c.vocab_size;
    reader.touch(start);
    reader.will_need(start, count);
    std::vector<int64_t> wide(static_cast<size_t>(count));
    try {
      reader.read(start, count, wide.data(), true);
      reader.read(start, count, out.data());
      MUST(fits);
    } catch (const DamagedFile&) {
      MUST(!fits);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      uint32_t id = 0;
      std::memcpy(&id, out.data() + i * c.item_size, static_cast<size_t>(c.item_size));
      MUST(id == c.id((start + i) % c.n_tokens) && wide[static_cast<size_t>(i)] == id);
    }
  }
  try {
    reader.read(size, 1, nullptr);
    MUST(false);
  } catch (const std::out_of_range&) {
  }
}

// A plan is refused, or each of its rows is refused or fits.
void check_plan(const Case& c, const std::string& path) {
  try {
    const PackPlan plan(path, c.seq_len, c.n_tokens);
    for (int64_t row = 0; row < plan.rows(); ++row) {
      try {
        int64_t used = 0;
        for (const Piece& piece : plan.pieces(row)) {
          MUST(piece.tokens >= 1 && piece.start >= 0 && piece.start <= c.n_tokens - piece.tokens);
          used += piece.tokens;
        }
        MUST(used >= 1 && used <= c.seq_len + 1 && plan.targets(row) < used);
      } catch (const std::runtime_error&) {
      }
    }
  } catch (const std::invalid_argument&) {
  } catch (const std::runtime_error&) {
  }
}

std::string make_folder() {
  const char* parent = std::getenv("TMPDIR");
  std::string folder = std::string(parent == nullptr ? "/tmp" : parent) + "/fuzz_headers_XXXXXX";
  MUST(mkdtemp(folder.data()) != nullptr);
  return folder;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string folder = make_folder();
  const Case c(data, size);
  const std::string path = folder + (c.format == Format::datatrove ? "/a.ds" : "/a.bin");
  write(path, c.file);
  if (c.is_plan) {
    check_plan(c, path);
    return 0;
  }
  if (c.format == Format::megatron) write(folder + "/a.idx", c.index);
  if (c.format == Format::datatrove) write(path + ".index", c.index);
  try {
    const TokenFile file(path, c.format, c.item_size, c.n_tokens);
  } catch (const std::invalid_argument&) {
    return 0;
  } catch (const DamagedFile&) {
    return 0;
  }
  check_accepted(c);
  check_reads(c, path);
  return 0;
}
