// Compiles functions with loops for a processor's widest vectors.
#pragma once

#include <algorithm>
#include <cstdint>

// Compiles a function for several widths of vectors; which one runs is chosen at load time (which
// the sanitizers cannot do). What it calls has to be inlined to be compiled so too.
#if defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define INGOT_VECTOR_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define INGOT_VECTOR_CLONES
#endif
#define INGOT_INLINE __attribute__((always_inline)) inline

namespace ingot {

// The items before the first at the edge of a line of the cache, `count` at most: writing those by
// themselves first keeps vectors that are written from lying across two lines, which is slow.
template <typename Item>
INGOT_INLINE int64_t before_line(const Item* items, int64_t count) {
  return std::min(count, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(items) % 64 / sizeof(Item)));
}

template <typename Item>
INGOT_INLINE Item* at_line(Item* items) {
  return static_cast<Item*>(__builtin_assume_aligned(items, 64));
}

}  // namespace ingot
