// The machine's limit for a loader: one thread copies random rows of a mapped token file into one
// buffer, batch after batch, and does nothing else. Run by benchmarks/loader/gather.py.
//
// gather FILE ITEM_BYTES OUT_BYTES T ROWS SECONDS EOD MAPPED
//   ITEM_BYTES  2 or 4, of an id in the file
//   OUT_BYTES   of an id in the buffer: ITEM_BYTES (copied) or 8 (widened)
//   T           a row is T + 1 ids from a multiple of T on
//   SECONDS     how long; 0: one batch
//   EOD         end-of-document id: also write int32 position ids and the starts of documents; -1: not
//   MAPPED      1: the file's pages are in this process's map before the clock starts
// Prints target tokens, seconds, CPU seconds and a checksum of the last batch.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

enum { kBlock = 64 };  // ids compared with EOD at a time

static double now(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void populate(const unsigned char* file, size_t size) {
#ifdef MADV_POPULATE_READ
  if (madvise((void*)file, size, MADV_POPULATE_READ) == 0) return;
#endif
  for (size_t i = 0; i < size; i += 4096) (void)*(const volatile unsigned char*)(file + i);
}

static uint64_t mix64(uint64_t x) {  // splitmix64's finaliser
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

static void widen16(const uint16_t* from, int64_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

static void widen32(const uint32_t* from, int64_t* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

// The first place in [from, T) that holds `eod`, else T.
#define FIND(name, type)                                                     \
  static int64_t name(const type* row, int64_t from, int64_t T, type eod) {  \
    for (; from + kBlock <= T; from += kBlock) {                             \
      int any = 0;                                                           \
      for (int64_t i = 0; i < kBlock; i++) any |= row[from + i] == eod;      \
      if (any) break;                                                        \
    }                                                                        \
    while (from < T && row[from] != eod) from++;                             \
    return from;                                                             \
  }
FIND(find16, uint16_t)
FIND(find32, uint32_t)

// Position ids of a row; the starts of its documents go to `starts`. Returns how many.
static int64_t documents(const void* row, int item, int64_t T, int64_t eod, int32_t base,
                         int32_t* positions, int32_t* starts) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < T;) {
    const int64_t end = item == 2 ? find16((const uint16_t*)row, begin, T, (uint16_t)eod)
                                  : find32((const uint32_t*)row, begin, T, (uint32_t)eod);
    const int64_t next = end < T ? end + 1 : T;
    starts[count++] = base + (int32_t)begin;
    for (int64_t t = begin; t < next; t++) positions[t] = (int32_t)(t - begin);
    begin = next;
  }
  return count;
}

int main(int argc, char** argv) {
  if (argc != 9) return fprintf(stderr, "gather FILE ITEM_BYTES OUT_BYTES T ROWS SECONDS EOD MAPPED\n"), 2;
  const int item = atoi(argv[2]), out = atoi(argv[3]);
  const int64_t T = atoll(argv[4]), rows = atoll(argv[5]), eod = atoll(argv[7]);
  const double seconds = atof(argv[6]);
  const int mapped = atoi(argv[8]);
  const int fd = open(argv[1], O_RDONLY);
  struct stat info;
  if (fd < 0 || fstat(fd, &info) != 0) return perror(argv[1]), 1;
  const unsigned char* file = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, fd, 0);
  if (file == MAP_FAILED) return perror(argv[1]), 1;
  if (mapped) populate(file, (size_t)info.st_size);
  const uint64_t places = (uint64_t)((info.st_size / item - 1) / T);
  const size_t row_bytes = (size_t)(T + 1) * (size_t)out;
  unsigned char* tokens = malloc((size_t)rows * row_bytes);
  int32_t* positions = malloc((size_t)(rows * T) * sizeof *positions);
  int32_t* starts = malloc((size_t)(rows * T) * sizeof *starts);
  if (!tokens || !positions || !starts) return perror("malloc"), 1;
  // Touched before the clock starts, as the buffers of a loader that has been running are.
  memset(tokens, 1, (size_t)rows * row_bytes);
  memset(positions, 1, (size_t)(rows * T) * sizeof *positions);
  memset(starts, 1, (size_t)(rows * T) * sizeof *starts);
  const double began = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
  uint64_t drawn = 0;
  int64_t batches = 0, count = 0;
  do {
    count = 0;
    for (int64_t b = 0; b < rows; b++) {
      const int64_t start = (int64_t)(mix64(++drawn) % places) * T;
      const unsigned char* row = file + start * item;
      unsigned char* to = tokens + (size_t)b * row_bytes;
      if (out == item) memcpy(to, row, row_bytes);
      else if (item == 2) widen16((const uint16_t*)row, (int64_t*)to, T + 1);
      else widen32((const uint32_t*)row, (int64_t*)to, T + 1);
      if (eod >= 0)
        count += documents(row, item, T, eod, (int32_t)(b * T), positions + b * T, starts + count);
    }
    batches++;
  } while (now(CLOCK_MONOTONIC) - began < seconds);
  const double took = now(CLOCK_MONOTONIC) - began;
  const double cpu_took = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  uint64_t sum = 0;
  for (size_t i = 0; i < (size_t)rows * row_bytes; i++) sum += tokens[i] * (uint64_t)(i + 1);
  if (eod >= 0) {
    for (int64_t i = 0; i < rows * T; i++) sum += (uint64_t)positions[i] * (uint64_t)(i + 1);
    for (int64_t i = 0; i < count; i++) sum += (uint64_t)starts[i] * (uint64_t)(i + 1);
  }
  printf("%lld %.9f %.9f %llu\n", (long long)(batches * rows * T), took, cpu_took,
         (unsigned long long)sum);
  return 0;
}
