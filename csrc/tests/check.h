// What the tests of csrc/core share.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <limits>
#include <string>
#include <vector>

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << std::endl; \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)

// `call` must throw an Error whose message holds `expected`.
template <typename Error>
void check_throws(const std::function<void()>& call, const std::string& expected) {
  try {
    call();
  } catch (const Error& error) {
    if (std::string(error.what()).find(expected) != std::string::npos) return;
    std::cerr << "found \"" << error.what() << "\", expected \"" << expected << "\"" << std::endl;
    std::exit(1);
  }
  std::cerr << "nothing was thrown, expected \"" << expected << "\"" << std::endl;
  std::exit(1);
}

// A raw file of the ids first, first + 1, ..., modulo 60,000; its path.
template <typename Id>
std::string write_tokens(const std::string& path, int64_t count, int64_t first = 0) {
  std::vector<Id> tokens(static_cast<size_t>(count));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<Id>((static_cast<size_t>(first) + i) % 60000);
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(tokens.data()),
             static_cast<std::streamsize>(tokens.size() * sizeof(Id)));
  return path;
}

void test_corpus(const std::string& folder);
void test_order();
void test_loader(const std::string& folder);
void test_packing(const std::string& folder);
