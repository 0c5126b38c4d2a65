// libFuzzer: any bytes, either as rows or as a refusal that names a line; never beyond the room that was promised.

#include "host/text_rows.h"

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const int64_t columns = 1 + data[0] % 8;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);
  const int64_t capacity = jmm_fast::row_capacity(text, columns);
  if (capacity * columns * 4 > static_cast<int64_t>(2 * size) + 4 * columns) std::abort();
  const auto out = std::make_unique<float[]>(static_cast<size_t>(capacity * columns));
  try {
    const int64_t rows = jmm_fast::parse_rows(text, columns, out.get());
    if (rows > capacity) std::abort();
  } catch (const std::invalid_argument& error) {
    if (!std::string_view(error.what()).starts_with("line ")) std::abort();
  }
  return 0;
}
