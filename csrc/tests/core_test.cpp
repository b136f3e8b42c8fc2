// Tests of csrc/core without Python, run by tests/data/test_data_sanitizers.py under the address,
// undefined behaviour and thread sanitizers. Usage: core_test <empty folder>
#include "tests/check.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  test_corpus(argv[1]);
  test_order();
  test_loader(argv[1]);
  test_packing(argv[1]);
  std::cout << "core_test: passed" << std::endl;
}
