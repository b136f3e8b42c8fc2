// What the fuzz targets share.
#pragma once

#include <cstdlib>
#include <iostream>

// Ends a fuzz target where what must hold does not.
#define MUST(condition)                                                      \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << "\n"; \
      std::abort();                                                          \
    }                                                                        \
  } while (false)
