// Tests of csrc/core, run by tests/data/test_data_sanitizers.py under the address, undefined
// behaviour and thread sanitizers. Usage: core_test <empty folder>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/order.h"
#include "core/prefetcher.h"
#include "core/token_store.h"
#include "tests/check.h"

using namespace ingot;

namespace {

constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
constexpr std::chrono::seconds kPatience{60};

template <typename Token>
std::string write_tokens(const std::string& path, int64_t count) {
  std::vector<Token> tokens(static_cast<size_t>(count));
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<Token>(i % 60000);
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(tokens.data()),
             static_cast<std::streamsize>(tokens.size() * sizeof(Token)));
  return path;
}

void test_store(const std::string& folder) {
  const std::string path = write_tokens<uint16_t>(folder + "/a.bin", 1000);
  const TokenStore store(path, 2, 1000);
  std::vector<uint16_t> out(10);
  store.read(990, 10, out.data());
  CHECK(out[0] == 990 && out[9] == 999);
  store.read(1000, 0, out.data());
  const int64_t bad[][2] = {{991, 10},       {-1, 2},        {0, -1},      {1001, 0}, {kLargest, 1},
                            {1, kLargest}, {kLargest, kLargest}, {-kLargest, 5}};
  for (const auto& range : bad)
    check_throws<std::out_of_range>([&] { store.read(range[0], range[1], out.data()); }, "outside");
  const auto open = [&](const std::string& name, int size, int64_t count) {
    return [=] { TokenStore(name, size, count); };
  };
  check_throws<std::runtime_error>(open(path, 2, 999), "has 2000 bytes, expected 1998");
  check_throws<std::runtime_error>(open(path, 4, 1000), "expected 4000");
  check_throws<std::runtime_error>(open(path, 3, 1000), "item size");
  check_throws<std::runtime_error>(open(path, 2, 0), "impossible token count");
  check_throws<std::runtime_error>(open(path, 2, -5), "impossible token count");
  check_throws<std::runtime_error>(open(path, 4, kLargest / 2), "impossible token count");
  check_throws<std::runtime_error>(open(folder + "/none.bin", 2, 5), "cannot be opened");
  check_throws<std::runtime_error>(open(folder, 2, 5), "not a regular file");
  CHECK(truncate(path.c_str(), 100) == 0);
  check_throws<std::runtime_error>([&] { store.check_not_truncated(); }, "was cut to 100");
}

void test_order() {
  for (const uint64_t n : {1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097}) {
    const Permutation permute(7, 3, n);
    std::vector<bool> seen(n);
    for (uint64_t i = 0; i < n; ++i) {
      const uint64_t at = permute(i);
      CHECK(at < n && !seen[at]);
      seen[at] = true;
    }
    check_throws<std::out_of_range>([&] { permute(n); }, "outside the epoch");
  }
  const uint64_t huge = uint64_t{1} << 62;
  CHECK(Permutation(1, 1, huge - 3)(huge - 4) < huge - 3);
  check_throws<std::invalid_argument>([] { SampleOrder(1, 0); }, "between 1 and 2^62");
  check_throws<std::invalid_argument>([&] { SampleOrder(1, huge + 1); }, "between 1 and 2^62");
  int64_t out[4];
  const SampleOrder order(1, 10);
  order.positions(static_cast<uint64_t>(kLargest) - 4, 4, out);
  check_throws<std::out_of_range>([&] { order.positions(kLargest - 3, 4, out); }, "below 2^63");
  check_throws<std::out_of_range>([&] { order.positions(0, -1, out); }, "below 2^63");
}

// Step s of the prefetcher holds what the order and the store say, whatever the threads do.
void test_prefetcher(const std::shared_ptr<const TokenStore>& store, int depth, int threads) {
  const Plan plan{16, 5, 37, 24, 6};
  const uint64_t n = static_cast<uint64_t>((store->size() - 1) / plan.seq_len);
  Prefetcher prefetcher(store, plan, depth, threads);
  std::vector<Batch> kept;  // batches stay what they were while others are assembled
  for (int64_t step = 0; step < 40; ++step) kept.push_back(*prefetcher.next(kPatience));
  for (int64_t step = 0; step < 40; ++step) {
    const Batch& batch = kept[static_cast<size_t>(step)];
    const int64_t first = plan.first + step * plan.stride;
    std::vector<int64_t> at(static_cast<size_t>(plan.rows));
    SampleOrder(plan.seed, n).positions(static_cast<uint64_t>(first), plan.rows, at.data());
    for (int64_t row = 0; row < plan.rows; ++row) {
      CHECK(batch.sample_ids[static_cast<size_t>(row)] == first + row);
      for (int64_t t = 0; t <= plan.seq_len; ++t) {
        int32_t token;
        std::memcpy(&token, batch.tokens.get() + (row * (plan.seq_len + 1) + t) * 4, 4);
        CHECK(token == static_cast<int32_t>((at[static_cast<size_t>(row)] * plan.seq_len + t) % 60000));
      }
    }
  }
}

void test_prefetcher_ends(const std::string& folder, const std::shared_ptr<const TokenStore>& store) {
  for (int i = 0; i < 20; ++i) Prefetcher(store, {16, 5, 0, 4, 4}, 3, 3);  // unused, ring full
  Prefetcher closed(store, {16, 5, 0, 4, 4}, 2, 2);
  closed.close();
  closed.close();
  check_throws<std::runtime_error>([&] { closed.next(kPatience); }, "is closed");

  Prefetcher busy(store, {16, 5, 0, 4, 4}, 2, 2);  // closed while another thread waits for batches
  std::thread reader([&] {
    try {
      while (true) busy.next(kPatience);
    } catch (const std::runtime_error&) {
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  busy.close();
  reader.join();

  Prefetcher far(store, {16, 5, kLargest - 9, 4, 4}, 2, 2);  // the third step leaves 63 bits
  far.next(kPatience);
  for (int i = 0; i < 3; ++i)
    check_throws<std::out_of_range>([&] { while (true) far.next(kPatience); }, "below 2^63");

  const auto start = [&](const Plan& plan, int depth, int threads) {
    return [=] { Prefetcher(store, plan, depth, threads); };
  };
  check_throws<std::invalid_argument>(start({0, 5, 0, 4, 4}, 1, 1), "seq_len");
  check_throws<std::invalid_argument>(start({kLargest, 5, 0, 4, 4}, 1, 1), "a sample needs");
  check_throws<std::invalid_argument>(start({16, 5, -1, 4, 4}, 1, 1), "first >= 0");
  check_throws<std::invalid_argument>(start({16, 5, 0, 3, 4}, 1, 1), "rows <= stride");
  check_throws<std::invalid_argument>(start({16, 5, 0, kLargest, kLargest}, 1, 1), "too large");
  check_throws<std::invalid_argument>(start({16, 5, 0, 4, 4}, 0, 1), "depth >= 1");

  const std::string path = write_tokens<int32_t>(folder + "/cut.bin", 500);
  Prefetcher cut(std::make_shared<TokenStore>(path, 4, 500), {16, 5, 0, 4, 4}, 1, 1);
  CHECK(truncate(path.c_str(), 4) == 0);
  check_throws<std::runtime_error>([&] { while (true) cut.next(kPatience); }, "was cut to 4");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::string folder = argv[1];
  test_store(folder);
  test_order();
  const auto path = write_tokens<int32_t>(folder + "/b.bin", 5000);
  const auto store = std::make_shared<const TokenStore>(path, 4, 5000);
  for (const int depth : {1, 2, 5})
    for (const int threads : {1, 3}) test_prefetcher(store, depth, threads);
  test_prefetcher_ends(folder, store);
  test_packing(folder);
  std::cout << "core_test: passed" << std::endl;
}
