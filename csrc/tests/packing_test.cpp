// Documents and packing plans. Every buffer has exactly the size that is promised to suffice, so
// that the address sanitizer sees a write beyond it. Called by core_test.cpp.
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/documents.h"
#include "core/packing.h"
#include "tests/check.h"

using namespace ingot;

namespace {

// Position ids and starts of T inputs, every `period`-th of which is the token 5.
template <typename Token>
void test_scan(int64_t T, int64_t period, bool eod_first) {
  std::vector<Token> row(static_cast<size_t>(T + 1), 1);
  for (int64_t t = 0; t <= T; ++t)
    if (t % period == 0) row[static_cast<size_t>(t)] = 5;
  std::vector<int32_t> positions(static_cast<size_t>(T)), starts(static_cast<size_t>(T));
  const int64_t count = scan_documents(row.data(), sizeof(Token), T, 5, eod_first, 1000,
                                       positions.data(), starts.data());
  int64_t found = 0;
  for (int64_t t = 0, position = 0; t < T; ++t, ++position) {
    if (t == 0 || row[static_cast<size_t>(eod_first ? t : t - 1)] == 5) {
      CHECK(starts[static_cast<size_t>(found++)] == 1000 + t);
      position = 0;
    }
    CHECK(positions[static_cast<size_t>(t)] == position);
  }
  CHECK(found == count);
}

void test_documents() {
  for (const int64_t T : {1, 2, 7, 63, 64, 65, 66, 129, 300})
    for (const int64_t period : {1, 2, 63, 64, 1000})
      for (const bool eod_first : {false, true}) {
        test_scan<uint8_t>(T, period, eod_first);
        test_scan<uint16_t>(T, period, eod_first);
        test_scan<int32_t>(T, period, eod_first);
        test_scan<int64_t>(T, period, eod_first);
      }
  std::vector<int32_t> positions(4), starts(4);
  std::vector<unsigned char> counted(4);
  const uint16_t row[5] = {};
  const auto scan = [&](int item_size, int64_t T, int32_t base) {
    return [=, &row, &positions, &starts] {
      scan_documents(row, item_size, T, 0, false, base, positions.data(), starts.data());
    };
  };
  check_throws<std::invalid_argument>(scan(3, 4, 0), "item size is 3");
  check_throws<std::invalid_argument>(scan(2, 0, 0), "does not fit 32-bit positions");
  check_throws<std::invalid_argument>(scan(2, 4, -1), "does not fit 32-bit positions");
  check_throws<std::invalid_argument>(scan(2, 4, 0x7ffffffc), "does not fit 32-bit positions");

  const auto lay_out = [&](const std::vector<Piece>& pieces) {
    return lay_out_pieces(pieces.data(), static_cast<int64_t>(pieces.size()), 4, 0x7ffffffb,
                          positions.data(), starts.data(), counted.data());
  };
  CHECK(lay_out({{9, 1}, {9, 1}, {9, 1}, {9, 1}, {9, 1}}) == 4);
  CHECK(starts[3] == 0x7ffffffe && positions[3] == 0 && counted[3] == 0);
  CHECK(lay_out({{9, 2}, {9, 1}}) == 3);
  CHECK((positions == std::vector<int32_t>{0, 1, 0, 0}));
  CHECK((counted == std::vector<unsigned char>{1, 0, 0, 0}));
  CHECK(lay_out({{9, 5}}) == 1 && lay_out({{9, 4}}) == 1 && counted[3] == 0);
  const std::vector<Piece> bad[] = {{{0, 6}}, {{0, 0}}, {{0, 3}, {0, 3}}, {{0, 1}, {0, kLargest}}};
  for (const auto& pieces : bad)
    check_throws<std::invalid_argument>([&] { lay_out(pieces); }, "does not fit");
  check_throws<std::invalid_argument>([&] { lay_out({}); }, "without a piece");

  std::vector<uint16_t> padded(3, 1);
  pad_row(padded.data(), 2, 1, 3, 40000);
  CHECK(padded[0] == 1 && padded[1] == 40000 && padded[2] == 40000);
}

std::string write_words(const std::string& path, const std::vector<int64_t>& words) {
  std::ofstream file(path, std::ios::binary);
  file.write("INGOTPLN", 8);
  file.write(reinterpret_cast<const char*>(words.data()),
             static_cast<std::streamsize>(words.size() * sizeof(int64_t)));
  return path;
}

void test_plan(const std::string& folder) {
  // Version, T, tokens, rows, pieces, their tokens; the pieces (from word 6); the rows' ends.
  const std::vector<int64_t> good = {1, 4, 12, 3, 4, 12, 0, 5, 5, 3, 8, 2, 10, 2, 1, 3, 4};
  const PackPlan plan(write_words(folder + "/plan", good), 4, 12);
  const auto walk = [&] {
    for (int64_t row = 0; row < plan.rows(); ++row) {
      int64_t tokens = 0;
      for (const Piece& piece : plan.pieces(row)) tokens += piece.tokens;
      CHECK(tokens >= 1 && tokens <= 5);
      CHECK(plan.targets(row) == tokens - static_cast<int64_t>(plan.pieces(row).size()));
    }
  };
  std::thread other(walk);
  walk();
  other.join();
  for (const int64_t row : {int64_t{-1}, int64_t{3}, kLargest})
    check_throws<std::out_of_range>([&] { plan.pieces(row); }, "outside its 3 rows");

  // Whatever stands in any word, a plan is refused, or its rows are, or they lie in the corpus.
  for (size_t word = 0; word < good.size(); ++word)
    for (const int64_t value : {-kLargest - 1, int64_t{-1}, int64_t{0}, int64_t{2}, int64_t{6},
                                int64_t{1} << 59, int64_t{1} << 60, kLargest}) {
      std::vector<int64_t> words = good;
      words[word] = value;
      try {
        const PackPlan lying(write_words(folder + "/lying", words), 4, 12);
        for (int64_t row = 0; row < lying.rows(); ++row)
          try {
            int64_t free = 5;
            for (const Piece& piece : lying.pieces(row)) {
              CHECK(piece.start >= 0 && piece.tokens >= 1 && piece.start <= 12 - piece.tokens);
              free -= piece.tokens;
            }
            CHECK(free >= 0 && free < 5);
          } catch (const std::runtime_error&) {
          }
      } catch (const std::runtime_error&) {
      }
    }
  const auto open = [&](int64_t seq_len, int64_t tokens) {
    return [=] { PackPlan(folder + "/plan", seq_len, tokens); };
  };
  check_throws<std::runtime_error>(open(5, 12), "seq_len 4; expected 5");
  check_throws<std::runtime_error>(open(4, 13), "tokens 12; expected 13");
  check_throws<std::invalid_argument>(open(kLargest, 12), "seq_len");
  check_throws<std::runtime_error>([&] { PackPlan(folder, 4, 12); }, "not a regular file");
  check_throws<std::runtime_error>([&] { PackPlan(folder + "/none", 4, 12); }, "cannot be opened");
  CHECK(truncate((folder + "/plan").c_str(), 50) == 0);
  check_throws<std::runtime_error>([&] { plan.check_not_truncated(); }, "was cut to 50");
  check_throws<std::runtime_error>(open(4, 12), "less than a header");
}

void test_planner() {
  for (const int64_t T : {1, 2, 62, 63, 64, 5000, 300000}) {
    std::vector<Piece> documents;
    int64_t start = int64_t{1} << 50, targets = 0;
    for (int64_t i = 1; i < 400; ++i) {
      documents.push_back({start, 1 + i * 7919 % (3 * T)});
      start += documents.back().tokens;
      targets += documents.back().tokens - 1;
    }
    const PackedRows rows = plan_window(documents, T);
    CHECK(rows.row_ends.back() == static_cast<int64_t>(rows.pieces.size()));
    size_t at = 0;
    for (const int64_t end : rows.row_ends) {
      CHECK(end > static_cast<int64_t>(at));
      for (int64_t free = T + 1; at < static_cast<size_t>(end); ++at) {
        free -= rows.pieces[at].tokens;
        targets -= rows.pieces[at].tokens - 1;
        CHECK(rows.pieces[at].tokens >= 1 && free >= 0);
      }
    }
    CHECK(targets == 0);
  }
  CHECK(plan_window({}, 4).pieces.empty());
  check_throws<std::invalid_argument>([] { plan_window({{0, 0}}, 4); }, "a document of 0 tokens");
  check_throws<std::invalid_argument>([] { plan_window({{kLargest, 1}}, 4); }, "a document of 1");
  check_throws<std::invalid_argument>([] { plan_window({{0, 1}}, 0); }, "seq_len is 0");
  check_throws<std::invalid_argument>([] { plan_window({{0, 1}}, kLargest); }, "seq_len is");
}

}  // namespace

void test_packing(const std::string& folder) {
  test_documents();
  test_plan(folder);
  test_planner();
}
