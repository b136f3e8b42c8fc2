// Threads that read one corpus through one cache of open files, run by tests/data/test_data_fuzz.py
// under the sanitizers. Usage: corpus_test <empty folder>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "core/corpus.h"

using namespace ingot;

namespace {

constexpr int kFiles = 20, kTokens = 50, kThreads = 4, kRow = 60;

void check(bool condition, const char* what) {
  if (condition) return;
  std::cerr << what << std::endl;
  std::exit(1);
}

// Files in which each token is its own position in the corpus.
CorpusSpec write_files(const std::string& folder) {
  CorpusSpec spec{Format::raw, 2, {}, {}, 60000};
  for (int file = 0; file < kFiles; ++file) {
    std::vector<uint16_t> tokens(kTokens);
    std::iota(tokens.begin(), tokens.end(), static_cast<uint16_t>(file * kTokens));
    spec.paths.push_back(folder + "/" + std::to_string(file) + ".bin");
    spec.tokens.push_back(kTokens);
    std::ofstream(spec.paths.back(), std::ios::binary)
        .write(reinterpret_cast<const char*>(tokens.data()), 2 * kTokens);
  }
  return spec;
}

void in_threads(const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
}

void test_reads(const CorpusSpec& spec, size_t capacity) {
  const auto cache = std::make_shared<FileCache>(capacity);
  const Corpus corpus(spec, cache);
  in_threads([&](int thread) {
    std::vector<uint16_t> row(kRow);
    for (int i = 0; i < 300; ++i) {
      Corpus::Reader reader(corpus);
      const int64_t start = (thread * 7919 + i * 104729) % (corpus.size() - kRow);
      reader.will_need(start, kRow);
      reader.touch(start);
      reader.read(start, kRow, row.data());
      for (int t = 0; t < kRow; ++t)
        check(row[static_cast<size_t>(t)] == start + t, "a token is not where it should be");
    }
  });
  check(cache->held() <= capacity, "the cache holds more files than it may");
  check(cache->opened() >= kFiles, "the cache does not count what it opens");
}

void test_damage(const CorpusSpec& spec) {
  check(truncate(spec.paths[3].c_str(), 10) == 0, "truncate");
  const Corpus corpus(spec, std::make_shared<FileCache>(3));
  std::atomic<int> refused{0}, read{0};
  in_threads([&](int) {
    std::vector<uint16_t> tokens(kTokens);
    for (int i = 0; i < 200; ++i) {
      Corpus::Reader reader(corpus);
      try {
        reader.read(i % kFiles * kTokens, kTokens, tokens.data());
        ++read;
      } catch (const DamagedFile&) {
        ++refused;
      }
    }
  });
  check(refused == kThreads * 10 && read == kThreads * 190, "other files than one are refused");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const CorpusSpec spec = write_files(argv[1]);
  for (const size_t capacity : {1, 2, 5, 40}) test_reads(spec, capacity);
  test_damage(spec);
  std::cout << "corpus_test: passed" << std::endl;
}
