// A fuzz target over the headers and indexes of token files, run under the sanitizers by
// tests/data/test_data_fuzz.py. With clang it is a libFuzzer target:
//   clang++ -fsanitize=fuzzer,address,undefined -Icsrc csrc/core/{token_file,corpus}.cpp <this>
// g++ has no libFuzzer: with -DINGOT_FUZZ_DRIVER and -fsanitize-coverage=trace-pc a small driver
// stands in for it. It mutates seeds and keeps what reached new code.
// Usage: fuzz_headers <folder of seeds> <seconds> <file for an input that fails>
//
// An input: format, item size and vocabulary (1 byte each), the claimed count of tokens (8), the
// size of the token file (2), the token file, then its index file to the end.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "core/corpus.h"
#include "core/token_file.h"

using namespace ingot;
using Bytes = std::vector<uint8_t>;
using Distance = Bytes::difference_type;

namespace {

#define MUST(condition)                                                      \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << "\n"; \
      std::abort();                                                          \
    }                                                                        \
  } while (false)

struct Case {
  Format format;
  int item_size;
  int64_t vocab_size, n_tokens;
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
    format = static_cast<Format>(kind[0] % 4);
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
    MUST(last > 0 && offset + last * int64_t{c.item_size} == c.n_tokens * c.item_size);
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
    try {
      reader.read(start, count, out.data());
      MUST(fits);
    } catch (const DamagedFile&) {
      MUST(!fits);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      uint32_t id = 0;
      std::memcpy(&id, out.data() + i * c.item_size, static_cast<size_t>(c.item_size));
      MUST(id == c.id((start + i) % c.n_tokens));
    }
  }
  try {
    reader.read(size, 1, nullptr);
    MUST(false);
  } catch (const std::out_of_range&) {
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

#ifdef INGOT_FUZZ_DRIVER
#include <chrono>
#include <filesystem>
#include <random>

extern "C" void __sanitizer_set_death_callback(void (*callback)());

namespace {

struct Progress {
  Bytes input;               // at hand
  std::string failure_path;  // where it is written if it fails
  uint8_t* seen;             // for each position in the code, hashed
  bool new_code = false;
};

constexpr int kSeenBits = 20;

Progress* progress = nullptr;

void save_failure() { write(progress->failure_path, progress->input); }

// Changes a few bytes in ways that headers are sensitive to.
Bytes mutate(Bytes input, const std::vector<Bytes>& pool, std::mt19937_64& random) {
  const auto below = [&](size_t n) { return n == 0 ? 0 : static_cast<size_t>(random() % n); };
  constexpr int64_t kNumbers[] = {0, 1, 2, 3, 8, 255, 1 << 16, -1, -8, INT32_MAX, INT32_MIN,
                                  INT64_MAX, INT64_MIN, int64_t{1} << 32, int64_t{1} << 61,
                                  INT64_MAX / 12, INT64_MAX / 8};
  for (size_t change = below(4); change < 4; ++change) {
    if (input.empty()) input.push_back(0);
    const size_t at = below(input.size());
    const size_t width = std::min(size_t{1} << below(4), input.size() - at);
    const auto here = input.begin() + static_cast<Distance>(at);
    const auto after = here + static_cast<Distance>(width);
    switch (below(7)) {
      case 0: input[at] ^= static_cast<uint8_t>(1u << below(8)); break;
      case 1: std::memcpy(input.data() + at, &kNumbers[below(std::size(kNumbers))], width); break;
      case 2: {  // a number, a little larger or smaller
        int64_t number = 0;
        std::memcpy(&number, input.data() + at, width);
        number = static_cast<int64_t>(static_cast<uint64_t>(number) + below(33) - 16);
        std::memcpy(input.data() + at, &number, width);
        break;
      }
      case 3: input.erase(here, below(2) ? input.end() : after); break;
      case 4: input.insert(here, below(40), static_cast<uint8_t>(random())); break;
      case 5: {  // the end of another input
        const Bytes& other = pool[below(pool.size())];
        const size_t from = std::min(at, other.size());
        input.resize(at);
        input.insert(input.end(), other.begin() + static_cast<Distance>(from), other.end());
        break;
      }
      default: input[below(std::min<size_t>(input.size(), 13))] = static_cast<uint8_t>(random());
    }
  }
  return input;
}

}  // namespace

// Called at every basic block.
extern "C" __attribute__((no_sanitize("address", "undefined"), no_sanitize_coverage)) void
__sanitizer_cov_trace_pc() {
  if (progress == nullptr) return;
  const auto position = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  const auto at = position * 0x9E3779B97F4A7C15u >> (64 - kSeenBits);
  if (progress->seen[at] != 0) return;
  progress->seen[at] = 1;
  progress->new_code = true;
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  std::vector<uint8_t> seen(size_t{1} << kSeenBits);
  Progress state{{}, argv[3], seen.data()};
  std::vector<Bytes> pool;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    std::ifstream file(entry.path(), std::ios::binary);
    pool.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  std::sort(pool.begin(), pool.end());
  MUST(!pool.empty());
  progress = &state;
  __sanitizer_set_death_callback(save_failure);
  std::mt19937_64 random(1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[2]));
  size_t runs = 0;
  const size_t seeds = pool.size();
  while (runs < seeds || std::chrono::steady_clock::now() < end) {
    state.input = runs < seeds ? pool[runs] : mutate(pool[random() % pool.size()], pool, random);
    state.new_code = false;
    LLVMFuzzerTestOneInput(state.input.data(), state.input.size());
    if (state.new_code && runs >= seeds) pool.push_back(state.input);
    ++runs;
  }
  progress = nullptr;
  std::cout << "fuzz_headers: " << runs << " inputs, " << pool.size() - seeds
            << " reached new code" << std::endl;
}
#endif
