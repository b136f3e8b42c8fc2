// What the tests of csrc/core share: checks that end the program with a line that says which failed.
#pragma once

#include <cstdlib>
#include <functional>
#include <iostream>
#include <string>

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << std::endl; \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

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

void test_packing(const std::string& folder);  // packing_test.cpp
