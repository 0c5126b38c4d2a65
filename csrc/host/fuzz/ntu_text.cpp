// Whatever the bytes: no access out of bounds, no undefined operation, no memory that the text does not justify.

#include "host/ntu_text.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto found = jmm_fast::parse_ntu({reinterpret_cast<const char*>(data), size});
  const size_t rows = found.frame.size();
  if (found.error.empty() != (found.error_line == 0)) std::abort();
  if (found.body.size() != rows || found.line.size() != rows) std::abort();
  if (found.error.empty() && found.joints.size() != rows * 75) std::abort();
  // A body takes 10 values on a line, a count, and 25 lines of 12 values; the last one may be cut.
  if (rows > 1 && (rows - 1) * 623 > size) std::abort();
  return 0;
}
