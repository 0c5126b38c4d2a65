#pragma once

#include <cstdint>
#include <string_view>

namespace jmm_fast {

/// Rows that `parse_rows` may write for `text`, one more than can be whole: at most `2 * text.size()` bytes and a row.
int64_t row_capacity(std::string_view text, int64_t columns);

/// Numbers of a text, a line a row, between blanks or single commas; blank lines at the end do not count. Values are
/// rounded to double and then to float, as Python's `float` and numpy do.
///
/// @param columns numbers in every row, at least 1
/// @param out     row-major, room for `row_capacity(text, columns)` rows
/// @return rows, each written whole
/// @throws std::invalid_argument a line that is not `columns` numbers: says which line and what is wrong with it
int64_t parse_rows(std::string_view text, int64_t columns, float* out);

}  // namespace jmm_fast
