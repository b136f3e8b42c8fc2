// The sampler and the prefetcher: what the threads assemble is what the schedule and the files say.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "core/prefetcher.h"
#include "tests/check.h"

using namespace ingot;

namespace {

constexpr std::chrono::seconds kPatience{60};
constexpr int64_t kTokens = 5000, kT = 16, kBatch = 24, kMicro = 3;
constexpr Share kShare{1, 2, kMicro};
constexpr int64_t kRows = kBatch / 2;

std::shared_ptr<const Schedule> one_phase(int64_t tokens) {
  const auto n = static_cast<uint64_t>((tokens - 1) / kT);
  return std::make_shared<Schedule>(5, std::vector<SchedulePhase>{{0, kBatch, kT, {{0, n, 0}}, {65536}}});
}

std::shared_ptr<const Sampler> make_sampler(const std::string& path, int64_t tokens, bool masks,
                                            bool skip = false, int64_t vocab = 60000,
                                            bool widen = false) {
  const CorpusSpec spec{Format::raw, 4, {path}, {tokens}, vocab};
  auto corpus = std::make_shared<const Corpus>(spec, std::make_shared<FileCache>(2));
  return std::make_shared<Sampler>(std::vector<SampledCorpus>{{corpus, 7, false, {}}},
                                   one_phase(tokens), kShare, false, masks, skip, widen);
}

// Memory of one step, exactly as much as it needs: the address sanitizer sees a write beyond.
struct Memory {
  explicit Memory(int64_t width = 4)
      : tokens(static_cast<size_t>(kRows * (kT + 1) * width)) {}
  std::vector<unsigned char> tokens;
  std::vector<int64_t> ids = std::vector<int64_t>(kRows);
  std::vector<int32_t> positions = std::vector<int32_t>(kRows * kT);
  std::vector<int32_t> starts = std::vector<int32_t>(kRows / kMicro * (kMicro * kT + 1));
  Buffers buffers() {
    return {tokens.data(), ids.data(), positions.data(), starts.data(), nullptr};
  }
};

std::vector<Buffers> buffers_of(std::vector<Memory>& slots) {
  std::vector<Buffers> out;
  for (Memory& slot : slots) out.push_back(slot.buffers());
  return out;
}

void test_steps(const std::string& path, size_t depth, int threads, bool masks, bool widen) {
  const int64_t width = widen ? 8 : 4;
  std::vector<Memory> slots(depth, Memory(width));
  Prefetcher prefetcher(make_sampler(path, kTokens, masks, false, 60000, widen), 37,
                        buffers_of(slots), threads);
  const auto schedule = one_phase(kTokens);
  for (int64_t step = 0; step < 40; ++step) {
    const auto ready = *prefetcher.next(kPatience);
    const Memory& slot = slots[ready.slot];
    CHECK(ready.info.target_count == kBatch * kT && ready.info.skipped == 0);
    CHECK(ready.info.documents.size() == (masks ? kRows / kMicro : 0));
    const int64_t first = 37 + step * kBatch + kRows;
    std::vector<Location> locations(kRows);
    schedule->locate(first, kRows, locations.data());
    for (int64_t row = 0; row < kRows; ++row) {
      CHECK(slot.ids[static_cast<size_t>(row)] == first + row);
      for (int64_t t = 0; t <= kT; ++t) {
        int64_t token = 0;
        std::memcpy(&token, slot.tokens.data() + (row * (kT + 1) + t) * width,
                    static_cast<size_t>(width));
        CHECK(token == locations[static_cast<size_t>(row)].position * kT + t);
      }
    }
  }
}

void test_ends(const std::string& path) {
  const auto sampler = make_sampler(path, kTokens, true);
  std::vector<Memory> slots(4);
  const auto buffers = buffers_of(slots);
  for (int i = 0; i < 20; ++i) Prefetcher(sampler, 0, buffers, 3);  // unused, ring full
  Prefetcher closed(sampler, 0, buffers, 2);
  closed.close();
  closed.close();
  check_throws<std::runtime_error>([&] { closed.next(kPatience); }, "is closed");

  Prefetcher busy(sampler, 0, buffers, 2);  // closed while another thread waits for steps
  std::thread reader([&] {
    try {
      while (true) busy.next(kPatience);
    } catch (const std::runtime_error&) {
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  busy.close();
  reader.join();

  Prefetcher far(sampler, kLargest - 2 * kBatch - 9, buffers, 2);  // the third step leaves 63 bits
  far.next(kPatience);
  for (int i = 0; i < 3; ++i)
    check_throws<std::out_of_range>([&] { while (true) far.next(kPatience); }, "below 2^63");
  check_throws<std::invalid_argument>([&] { Prefetcher(sampler, -1, buffers, 1); }, "consumed");
  check_throws<std::invalid_argument>([&] { Prefetcher(sampler, 0, buffers, 0); }, "1 thread");
  check_throws<std::invalid_argument>([&] { Prefetcher(sampler, 0, {buffers[0]}, 1); }, "2 slots");
}

void test_damage(const std::string& folder) {
  const std::string path = write_tokens<int32_t>(folder + "/cut.bin", kTokens);
  std::vector<Memory> slots(2);
  Prefetcher cut(make_sampler(path, kTokens, false), 0, buffers_of(slots), 1);
  CHECK(truncate(path.c_str(), 4) == 0);
  check_throws<DamagedFile>([&] { while (true) cut.next(kPatience); }, "cut.bin");

  // Ids from 4000 on are refused: a fifth of the samples, replaced by others.
  const std::string other = write_tokens<int32_t>(folder + "/skip.bin", kTokens);
  Prefetcher skipping(make_sampler(other, kTokens, false, true, 4000), 0, buffers_of(slots), 2);
  int64_t skipped = 0;
  for (int step = 0; step < 13; ++step) {  // half of an epoch
    const auto ready = *skipping.next(kPatience);
    skipped += ready.info.skipped;
    for (size_t i = 0; i < slots[ready.slot].tokens.size(); i += 4) {
      int32_t token;
      std::memcpy(&token, slots[ready.slot].tokens.data() + i, 4);
      CHECK(token < 4000);
    }
  }
  CHECK(skipped > 10 && skipped < 60);
}

void test_sampler_refuses(const std::string& path) {
  const CorpusSpec spec{Format::raw, 4, {path}, {kTokens}, 60000};
  const auto corpus = std::make_shared<const Corpus>(spec, std::make_shared<FileCache>(2));
  const std::vector<SampledCorpus> corpora{{corpus, 7, false, {}}};
  const auto make = [&](std::shared_ptr<const Schedule> schedule, Share share, bool packed) {
    return [=] { Sampler(corpora, schedule, share, packed, true, false, false); };
  };
  check_throws<std::invalid_argument>(make(one_phase(9000), kShare, false), "the schedule says");
  check_throws<std::invalid_argument>(make(one_phase(kTokens), kShare, true), "no plan");
  check_throws<std::invalid_argument>(make(one_phase(kTokens), {2, 2, 1}, false), "dp_rank");
  check_throws<std::invalid_argument>(make(one_phase(kTokens), {0, 5, 1}, false), "multiple");
}

}  // namespace

void test_loader(const std::string& folder) {
  const auto path = write_tokens<int32_t>(folder + "/loader.bin", kTokens);
  for (const size_t depth : {2, 3, 7})
    for (const int threads : {1, 3})
      for (const bool widen : {false, true}) test_steps(path, depth, threads, threads == 3, widen);
  test_ends(path);
  test_damage(folder);
  test_sampler_refuses(path);
}
