// The machine's limit for a loader: one thread copies random rows of a mapped token file into one
// buffer and does nothing else. Compiled and called, once for each batch, by gather.py.
#include <stdint.h>
#include <string.h>

enum { kBlock = 64 };  // ids compared with the end-of-document id at a time

static uint64_t mix64(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// widen_*: n ids as int64. find_*: the first place in [from, T) that holds `eod`, else T.
#define FOR_IDS(type)                                                                      \
  static void widen_##type(const type* from, int64_t* to, int64_t n) {                     \
    for (int64_t i = 0; i < n; i++) to[i] = from[i];                                       \
  }                                                                                        \
  static int64_t find_##type(const type* row, int64_t from, int64_t T, type eod) {         \
    for (; from + kBlock <= T; from += kBlock) {                                           \
      int any = 0;                                                                         \
      for (int64_t i = 0; i < kBlock; i++) any |= row[from + i] == eod;                    \
      if (any) break;                                                                      \
    }                                                                                      \
    while (from < T && row[from] != eod) from++;                                           \
    return from;                                                                           \
  }
FOR_IDS(uint16_t)
FOR_IDS(uint32_t)

// Position ids of a row; the starts of its documents go to `starts`. Returns how many.
static int64_t documents(const void* row, int64_t item, int64_t T, int64_t eod, int64_t base,
                         int32_t* positions, int32_t* starts) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < T;) {
    const int64_t end = item == 2 ? find_uint16_t(row, begin, T, (uint16_t)eod)
                                  : find_uint32_t(row, begin, T, (uint32_t)eod);
    const int64_t next = end < T ? end + 1 : T;
    starts[count++] = (int32_t)(base + begin);
    for (int64_t t = begin; t < next; t++) positions[t] = (int32_t)(t - begin);
    begin = next;
  }
  return count;
}

// One batch: `rows` of the `places` rows of the file, each of T + 1 ids of `item` bytes, copied or
// (out = 8, not item) widened. With eod >= 0 int32 position ids too, and the starts of documents,
// rows * T after the last. `drawn`: rows of the batches before. Returns the count of documents.
int64_t gather(const unsigned char* file, int64_t places, int64_t drawn, int64_t item, int64_t out,
               int64_t T, int64_t rows, int64_t eod, unsigned char* tokens, int32_t* positions,
               int32_t* starts) {
  int64_t count = 0;
  for (int64_t b = 0; b < rows; b++) {
    const int64_t place = (int64_t)(mix64((uint64_t)(drawn + b + 1)) % (uint64_t)places);
    const unsigned char* row = file + place * T * item;
    unsigned char* to = tokens + b * (T + 1) * out;
    if (out == item) memcpy(to, row, (size_t)((T + 1) * out));
    else if (item == 2) widen_uint16_t((const uint16_t*)row, (int64_t*)to, T + 1);
    else widen_uint32_t((const uint32_t*)row, (int64_t*)to, T + 1);
    if (eod >= 0) count += documents(row, item, T, eod, b * T, positions + b * T, starts + count);
  }
  if (eod >= 0) starts[count] = (int32_t)(rows * T);
  return count;
}
