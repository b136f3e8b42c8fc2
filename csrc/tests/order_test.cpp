// The permutation, blends and schedules at their edges; their values are tested from Python.
#include <cmath>

#include "core/blend.h"
#include "core/order.h"
#include "core/schedule.h"
#include "tests/check.h"

using namespace ingot;

namespace {

void test_permutation() {
  for (const uint64_t n : {1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097}) {
    const Permutation permute(7, 3, n);
    std::vector<bool> seen(n);
    std::vector<int64_t> range(n);
    permute.range(0, static_cast<int64_t>(n), range.data());
    for (uint64_t i = 0; i < n; ++i) {
      const uint64_t at = permute(i);
      CHECK(at < n && !seen[at] && at == static_cast<uint64_t>(range[i]));
      seen[at] = true;
    }
    check_throws<std::out_of_range>([&] { permute(n); }, "outside the epoch");
  }
  const uint64_t huge = uint64_t{1} << 62;
  CHECK(Permutation(1, 1, huge - 3)(huge - 4) < huge - 3);
  int64_t out[4];
  const auto draw = [&](uint64_t n, uint64_t first, int64_t count) {
    sample_positions(1, n, first, count, out);
  };
  check_throws<std::invalid_argument>([&] { draw(0, 0, 1); }, "between 1 and 2^62");
  check_throws<std::invalid_argument>([&] { draw(huge + 1, 0, 1); }, "between 1 and 2^62");
  draw(10, static_cast<uint64_t>(kLargest) - 4, 4);
  check_throws<std::out_of_range>([&] { draw(10, kLargest - 3, 4); }, "below 2^63");
  check_throws<std::out_of_range>([&] { draw(10, 0, -1); }, "below 2^63");
}

void test_blend() {
  const std::vector<uint32_t> shares{1, 65536 - 1 - 20000 - 3, 20000, 3};
  const BlendTable table(shares);
  std::vector<uint64_t> drawn(shares.size());
  for (uint64_t i = 0; i < 2 * BlendTable::kPeriod; ++i) {
    const BlendTable::Entry entry = table.at(i);
    CHECK(entry.ordinal == drawn[entry.source]++);
    for (size_t s = 0; s < shares.size(); ++s) {
      const double share = static_cast<double>(i + 1) * shares[s] / BlendTable::kPeriod;
      CHECK(std::abs(share - static_cast<double>(drawn[s])) < 1);
    }
  }
  CHECK(table.count(2, 2 * BlendTable::kPeriod) == 40000);
  check_throws<std::invalid_argument>([] { BlendTable({1, 2}); }, "");
  check_throws<std::invalid_argument>([] { BlendTable({0, 65536}); }, "");
}

void test_schedule() {
  const SchedulePhase first{0, 8, 16, {{0, 100, 0}, {1, 50, 0}}, {40000, 25536}};
  const SchedulePhase second{80, 4, 16, {{0, 100, 49}}, {65536}};
  const Schedule schedule(3, {first, second});
  std::vector<Location> locations(80), parts(80);
  schedule.locate(0, 80, locations.data());
  for (int64_t i = 0; i < 80; i += 5) schedule.locate(i, 5, parts.data() + i);
  for (size_t i = 0; i < 80; ++i) {
    CHECK(locations[i].corpus == parts[i].corpus && locations[i].position == parts[i].position);
    CHECK(schedule.after(locations[i], 0).position < 100);
  }
  CHECK(schedule.phase_index(79) == 0 && schedule.phase_index(80) == 1);
  check_throws<std::invalid_argument>([&] { schedule.locate(76, 8, locations.data()); }, "phases");
  check_throws<std::out_of_range>([&] { schedule.locate(kLargest - 1, 8, locations.data()); }, "2^63");
  check_throws<std::out_of_range>([&] { schedule.phase_index(-1); }, "negative");
  check_throws<std::invalid_argument>([] { Schedule(3, {}); }, "at least one phase");
  check_throws<std::invalid_argument>([&] { Schedule(3, {second}); }, "expected 0");
}

}  // namespace

void test_order() {
  test_permutation();
  test_blend();
  test_schedule();
}
