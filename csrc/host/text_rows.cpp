#include "host/text_rows.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace jmm_fast {

namespace {

constexpr double kPowers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                              1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

constexpr double kSigns[] = {1, -1};

constexpr uint64_t kWholePowers[] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000, 100000000};

bool is_blank(char c) { return c == ' ' || (c >= '\t' && c <= '\r' && c != '\n'); }

bool ends_token(char c) { return c == ',' || c == '\n' || is_blank(c); }

/// Appends the digits at `p` to `mantissa`, which is right for up to 19 of them; returns how many there are.
int64_t read_digits(const char*& p, const char* end, uint64_t& mantissa) {
  const char* const begin = p;
  for (unsigned digit; p < end && (digit = static_cast<unsigned char>(*p) - '0') < 10; ++p) {
    mantissa = mantissa * 10 + digit;
  }
  return p - begin;
}

/// How many decimals the last number had, and the bit that told.
struct Habit {
  uint64_t mark = 1;
  int count = 0;
};

/// The same for decimals, of which there are many: eight at a time.
int64_t read_decimals(const char*& p, const char* end, uint64_t& mantissa, Habit& habit) {
  const char* const begin = p;
  if constexpr (std::endian::native == std::endian::little) {
    if (end - p >= 8) {
      uint64_t bytes;
      std::memcpy(&bytes, p, 8);
      bytes ^= 0x3030303030303030u;
      const uint64_t others = (((bytes & 0x7f7f7f7f7f7f7f7fu) + 0x7676767676767676u) | bytes) & 0x8080808080808080u;
      // Where the next number starts would hang on this one's digits; as nearly all have as many, a guess goes ahead.
      if ((others & (0 - others)) != habit.mark) {
        habit.mark = others & (0 - others);
        habit.count = std::countr_zero(others) / 8;
        if (habit.count == 0) return 0;
      }
      const int count = habit.count;
      if (count == 0) return 0;
      // Digits to the end of the word, zeros before them; then neighbours are joined to pairs, fours and eight.
      bytes <<= 64 - 8 * count;
      bytes = bytes * 10 + (bytes >> 8);
      const uint64_t even = (bytes & 0x000000ff000000ffu) * (100 + (1000000ull << 32));
      const uint64_t odd = (bytes >> 16 & 0x000000ff000000ffu) * (1 + (10000ull << 32));
      mantissa = mantissa * kWholePowers[count] + ((even + odd) >> 32);
      p += count;
      if (count < 8) return count;
    }
  }
  read_digits(p, end, mantissa);
  return p - begin;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && (text.back() == '\n' || is_blank(text.back()))) text.remove_suffix(1);
  return text;
}

std::string_view token_at(const char* p, const char* end) {
  return {p, static_cast<size_t>(std::find_if(p, end, ends_token) - p)};
}

[[noreturn]] void refuse(int64_t line, const std::string& what) {
  throw std::invalid_argument("line " + std::to_string(line) + ": " + what);
}

[[noreturn]] void refuse_value(int64_t line, int64_t value, const char* what, std::string_view token) {
  std::string shown(token.substr(0, 24));
  for (char& c : shown) c = c >= ' ' && c <= '~' ? c : '?';
  refuse(line, "value " + std::to_string(value) + " " + what + ": " + shown);
}

[[noreturn]] void refuse_count(int64_t line, int64_t columns, const char* begin, const char* end) {
  int64_t count = 0;
  bool inside = false;
  for (; begin < end && *begin != '\n'; ++begin) {
    const bool now = !ends_token(*begin);
    count += now && !inside;
    inside = now;
  }
  refuse(line, "expected " + std::to_string(columns) + " numbers, got " + std::to_string(count));
}

double parse_any(std::string_view token, int64_t line, int64_t value) {
  const char *begin = token.data(), *end = begin + token.size();
  if (begin < end && *begin == '+' && begin + 1 < end && begin[1] != '-') ++begin;
  double number = 0;
  const auto [stop, error] = std::from_chars(begin, end, number);
  // from_chars would also take nan(text).
  if (error == std::errc::invalid_argument || stop != end || token.back() == ')') {
    refuse_value(line, value, "is not a number", token);
  }
  const std::string_view mantissa(
      begin, static_cast<size_t>(std::find_if(begin, end, [](char c) { return (c | 0x20) == 'e'; }) - begin));
  const bool digits = mantissa.find_first_of("0123456789") != std::string_view::npos;
  const bool zero = mantissa.find_first_of("123456789") == std::string_view::npos;
  // Standard libraries differ in whether they report these or round to infinity and zero.
  if (error != std::errc() || (digits && (std::isinf(number) || (number == 0 && !zero)))) {
    refuse_value(line, value, "is out of range", token);
  }
  return number;
}

}  // namespace

int64_t row_capacity(std::string_view text, int64_t columns) {
  const std::string_view body = trimmed(text);
  if (body.empty()) return 0;
  int64_t lines = 1;
  // memchr is faster than a count, as lines are long.
  for (size_t at = 0; (at = body.find('\n', at)) != body.npos; ++at) ++lines;
  // A row takes a character and what ends it for each number; only the row at which reading stops can be shorter.
  return std::min(lines, (static_cast<int64_t>(body.size()) + 1) / 2 / columns + 1);
}

int64_t parse_rows(std::string_view text, int64_t columns, float* out) {
  const std::string_view body = trimmed(text);
  const char *p = body.data(), *const end = p + body.size();
  int64_t line = 0;
  Habit habit;
  const auto skip_blanks = [&] {
    while (p < end && is_blank(*p)) ++p;
  };
  while (p < end) {
    float* const row = out + line++ * columns;
    const char* const line_begin = p;
    int64_t count = 0;
    for (skip_blanks(); p < end && *p != '\n'; ++count) {
      if (*p == ',') refuse(line, "value " + std::to_string(count + 1) + " is empty");
      if (count == columns) refuse_count(line, columns, line_begin, end);
      const char* const token = p;
      const bool negative = *p == '-';
      p += negative;
      uint64_t mantissa = 0;
      int64_t digits = read_digits(p, end, mantissa), decimals = 0;
      if (p < end && *p == '.') {
        decimals = read_decimals(++p, end, mantissa, habit);
        digits += decimals;
      }
      double number;
      // Up to 15 digits and a power of ten up to 22 are exact in double, so one division rounds as it should.
      if (digits >= 1 && digits <= 15 && (p == end || ends_token(*p))) {
        // Signs are as good as random: no branch on them.
        number = static_cast<double>(static_cast<int64_t>(mantissa)) / kPowers[decimals] * kSigns[negative];
      } else {
        const std::string_view all = token_at(token, end);
        number = parse_any(all, line, count + 1);
        p = token + all.size();
      }
      row[count] = static_cast<float>(number);
      skip_blanks();
      if (p < end && *p == ',') {
        ++p;
        skip_blanks();
      }
    }
    if (count != columns) refuse_count(line, columns, line_begin, end);
    if (p < end) ++p;
  }
  return line;
}

}  // namespace jmm_fast
