// Corpora of many files: reads across edges, the cache of open files, damage.
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "core/corpus.h"
#include "tests/check.h"

using namespace ingot;

namespace {

constexpr int64_t kFiles = 20, kTokens = 100;  // of each file

CorpusSpec make_files(const std::string& folder) {
  CorpusSpec spec{Format::raw, 2, {}, {}, 60000};
  for (int64_t i = 0; i < kFiles; ++i) {
    spec.paths.push_back(write_tokens<uint16_t>(
        folder + "/part" + std::to_string(i) + ".bin", kTokens, i * kTokens));
    spec.tokens.push_back(kTokens);
  }
  return spec;
}

void check_read(Corpus::Reader& reader, int64_t start, int64_t count) {
  std::vector<uint16_t> out(static_cast<size_t>(count) + 1, 7);
  reader.read(start, count, out.data());
  for (int64_t i = 0; i < count; ++i) CHECK(out[static_cast<size_t>(i)] == start + i);
  CHECK(out.back() == 7);  // nothing was written behind the end
  std::vector<int64_t> wide(static_cast<size_t>(count) + 1, 7);
  reader.read(start, count, wide.data(), true);
  for (int64_t i = 0; i < count; ++i) CHECK(wide[static_cast<size_t>(i)] == start + i);
  CHECK(wide.back() == 7);
}

void test_reads(const CorpusSpec& spec) {
  const auto cache = std::make_shared<FileCache>(3);
  const Corpus corpus(spec, cache);
  CHECK(corpus.size() == kFiles * kTokens);
  CHECK(cache->opened() == 0);
  Corpus::Reader reader(corpus);
  for (int64_t start = 0; start < corpus.size(); start += 37)
    for (const int64_t count : {int64_t{0}, int64_t{1}, kTokens, 3 * kTokens + 1})
      if (count <= corpus.size() - start) {
        reader.will_need(start, count);
        reader.touch(start);
        check_read(reader, start, count);
      }
  check_read(reader, 0, corpus.size());
  CHECK(cache->held() <= 3);
  const int64_t size = corpus.size();
  const int64_t bad[][2] = {{size - 9, 10}, {-1, 2}, {0, -1}, {size + 1, 0}, {kLargest, 1},
                            {1, kLargest}, {kLargest, kLargest}, {-kLargest, 5}};
  uint16_t out[16];
  for (const auto& range : bad) {
    reader.will_need(range[0], range[1]);
    check_throws<std::out_of_range>([&] { reader.read(range[0], range[1], out); }, "outside");
  }
}

void test_threads(const CorpusSpec& spec) {
  const auto cache = std::make_shared<FileCache>(2);  // fewer than the threads hold
  const Corpus corpus(spec, cache);
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t)
    threads.emplace_back([&corpus, t] {
      for (int64_t i = 0; i < 300; ++i) {
        Corpus::Reader reader(corpus);
        check_read(reader, (i * 97 + t * 501) % (corpus.size() - 150), 150);
      }
    });
  for (std::thread& thread : threads) thread.join();
}

// One file of four blocks and a bit, of which a bit of the third is flipped.
void test_sums(const std::string& folder) {
  constexpr int64_t kIds = 4 * BlockSums::kBlock / 2 + 5, kFlipped = 2 * BlockSums::kBlock / 2 + 77;
  std::vector<uint16_t> ids(kIds);
  for (int64_t i = 0; i < kIds; ++i) ids[static_cast<size_t>(i)] = static_cast<uint16_t>(i % 60000);
  const auto* bytes = reinterpret_cast<const unsigned char*>(ids.data());
  std::vector<uint64_t> sums;
  for (int64_t at = 0; at < 2 * kIds; at += BlockSums::kBlock)
    sums.push_back(xxh64(bytes + at, static_cast<size_t>(std::min(BlockSums::kBlock, 2 * kIds - at))));
  CHECK(xxh64(nullptr, 0) == 0xEF46DB3751D8E999 && sums.size() == 5);
  const auto write = [&](const std::string& path, const void* from, size_t count) {
    std::ofstream(path, std::ios::binary)
        .write(static_cast<const char*>(from), static_cast<std::streamsize>(count));
    return path;
  };
  ids[kFlipped] ^= 4;
  const CorpusSpec spec{Format::raw, 2, {write(folder + "/summed.bin", bytes, 2 * kIds)}, {kIds}, 60000,
                        write(folder + "/summed.sums", sums.data(), 8 * sums.size())};
  const Corpus corpus(spec, std::make_shared<FileCache>(2));
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t)
    threads.emplace_back([&corpus, t] {
      uint16_t out[300];
      for (int64_t i = 0; i < 300; ++i) {
        const int64_t start = (i * 9973 + t * 501) % (kIds - 300);
        const bool bad = start < kFlipped / 32768 * 32768 + 32768 && start + 300 > kFlipped / 32768 * 32768;
        Corpus::Reader reader(corpus);
        reader.will_need(start, 300);
        const auto read = [&] { reader.read(start, 300, out); };
        if (bad) check_throws<DamagedFile>(read, "summed.bin: the 65536 bytes from byte 131072 on");
        else read();
      }
    });
  for (std::thread& thread : threads) thread.join();
  uint16_t out[1];
  Corpus::Reader(corpus).read(kIds - 1, 1, out);
  CHECK(truncate(spec.sums.c_str(), 33) == 0);
  Corpus::Reader(corpus).read(kIds - 1, 1, out);  // whose sum is not needed again
  const Corpus again(spec, std::make_shared<FileCache>(2));
  check_throws<DamagedFile>([&] { Corpus::Reader(again).read(kIds - 1, 1, out); }, "summed.sums: cannot");
  CHECK(unlink(spec.sums.c_str()) == 0);
  check_throws<DamagedFile>([&] { Corpus(spec, std::make_shared<FileCache>(2)); }, "summed.sums: cannot");
}

void test_damage(CorpusSpec spec) {
  const auto cache = std::make_shared<FileCache>(2);
  uint16_t out[300];
  spec.vocab_size = 1950;
  const Corpus narrow(spec, cache);
  Corpus::Reader reader(narrow);
  reader.read(1900, 50, out);
  check_throws<DamagedFile>([&] { reader.read(1900, 51, out); }, "part19.bin: the id at byte 100");
  spec.vocab_size = 60000;
  const Corpus corpus(spec, cache);
  Corpus::Reader open(corpus);
  open.read(0, 1, out);
  CHECK(truncate(spec.paths[0].c_str(), 100) == 0);
  Corpus::Reader later(corpus);
  check_throws<DamagedFile>([&] { later.read(0, 1, out); }, "part0.bin: was cut to 100");
  CHECK(unlink(spec.paths[1].c_str()) == 0);
  check_throws<DamagedFile>([&] { later.read(100, 1, out); }, "part1.bin");
  later.will_need(100, 1);  // never throws
  spec.tokens[2] = 99;
  const Corpus lying(spec, cache);
  check_throws<DamagedFile>([&] { Corpus::Reader(lying).read(250, 1, out); }, "part2.bin");
  spec.tokens[2] = kLargest;
  check_throws<std::invalid_argument>([&] { Corpus(spec, cache); }, "");
  check_throws<std::invalid_argument>([&] { Corpus({Format::raw, 2, {}, {}, 10}, cache); }, "");
  check_throws<std::invalid_argument>([] { FileCache(0); }, "at least 1");
}

}  // namespace

void test_corpus(const std::string& folder) {
  const CorpusSpec spec = make_files(folder);
  test_reads(spec);
  test_threads(spec);
  test_sums(folder);
  test_damage(spec);
}
