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

/// Exact but for the one rounding of the division while `mantissa` has at most 15 digits and `decimals` are at most 22.
double divided(uint64_t mantissa, int64_t decimals, bool negative) {
  // Signs are as good as random: no branch on them.
  return static_cast<double>(static_cast<int64_t>(mantissa)) / kPowers[decimals] * kSigns[negative];
}

/// Appends the digits at `p` to `mantissa`, which is right for up to 19 of them; returns how many there are.
int64_t read_digits(const char*& p, const char* end, uint64_t& mantissa) {
  const char* const begin = p;
  for (unsigned digit; p < end && (digit = static_cast<unsigned char>(*p) - '0') < 10; ++p) {
    mantissa = mantissa * 10 + digit;
  }
  return p - begin;
}

/// How many decimals the last number had, and the bit that told.
struct Form {
  uint64_t mark = 0;
  int decimals = 8;
};

/// A number of the form that nearly all have in a recording, one digit and up to seven decimals, eight characters at a
/// time. Reads up to 11 characters; leaves `p` where it is and returns false for a number of any other form.
bool read_usual(const char*& p, Form& form, double& number) {
  if constexpr (std::endian::native != std::endian::little) return false;
  const bool negative = *p == '-';
  const char* const whole = p + negative;
  const uint64_t digit = static_cast<unsigned char>(*whole) - uint64_t{'0'};
  uint64_t bytes;
  std::memcpy(&bytes, whole + 2, 8);
  bytes ^= 0x3030303030303030u;
  const uint64_t others = (((bytes & 0x7f7f7f7f7f7f7f7fu) + 0x7676767676767676u) | bytes) & 0x8080808080808080u;
  const uint64_t mark = others & (0 - others);
  // Where the next number starts would hang on this one's digits; a guess that is nearly always right goes ahead.
  if (mark != form.mark) form = {mark, std::countr_zero(others) / 8};
  const int decimals = form.decimals;
  if (digit > 9 || whole[1] != '.' || decimals % 8 == 0 || !ends_token(whole[2 + decimals])) return false;
  // Digits to the end of the word, zeros before them; then neighbours are joined to pairs, fours and eight.
  bytes <<= 64 - 8 * decimals;
  bytes = bytes * 10 + (bytes >> 8);
  const uint64_t even = (bytes & 0x000000ff000000ffu) * (100 + (1000000ull << 32));
  const uint64_t odd = (bytes >> 16 & 0x000000ff000000ffu) * (1 + (10000ull << 32));
  number = divided(digit * kWholePowers[decimals] + ((even + odd) >> 32), decimals, negative);
  p = whole + 2 + decimals;
  return true;
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
  const char *begin = token.data(), *const end = begin + token.size();
  const bool negative = *begin == '-';
  const char* p = begin + negative;
  uint64_t mantissa = 0;
  int64_t decimals = 0, count = read_digits(p, end, mantissa);
  if (p < end && *p == '.') {
    decimals = read_digits(++p, end, mantissa);
    count += decimals;
  }
  if (p == end && count >= 1 && count <= 15) return divided(mantissa, decimals, negative);
  if (*begin == '+' && begin + 1 < end && begin[1] != '-') ++begin;
  double number = 0;
  const auto [stop, error] = std::from_chars(begin, end, number);
  // from_chars would also take nan(text).
  if (error == std::errc::invalid_argument || stop != end || token.back() == ')') {
    refuse_value(line, value, "is not a number", token);
  }
  const std::string_view significant = token.substr(0, token.find_first_of("eE"));
  const bool digits = significant.find_first_of("0123456789") != std::string_view::npos;
  const bool zero = significant.find_first_of("123456789") == std::string_view::npos;
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
  Form form;
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
      double number;
      if (end - p < 11 || !read_usual(p, form, number)) {
        const std::string_view token = token_at(p, end);
        number = parse_any(token, line, count + 1);
        p += token.size();
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
