#include "host/ntu_text.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <limits>
#include <system_error>
#include <utility>

namespace jmm_fast {

namespace {

constexpr int64_t kBodyFields = 10, kJointFields = 12;

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && is_space(text.front())) text.remove_prefix(1);
  while (!text.empty() && is_space(text.back())) text.remove_suffix(1);
  return text;
}

/// The first field of `text`, which does not begin with a space.
std::string_view field(std::string_view text) {
  return text.substr(0, std::find_if(text.begin(), text.end(), is_space) - text.begin());
}

/// Sixteen characters at once: an extension that GCC and Clang share.
using Block = uint8_t __attribute__((vector_size(16)));

Block load(const void* at) {
  Block block;
  std::memcpy(&block, at, sizeof block);
  return block;
}

/// All bits of a byte set where a field starts: a space before it and none in it.
Block starts(const char* at) {
  const auto spaces = [](Block text) { return Block(text == ' ') | Block(text - '\t' <= '\r' - '\t'); };
  return spaces(load(at - 1)) & ~spaces(load(at));
}

/// Number of fields in `line`; what follows it up to `limit` may be looked at.
int64_t count_fields(std::string_view line, const char* limit) {
  if (line.empty()) return 0;
  int64_t count = !is_space(line[0]);
  const char *at = line.data() + 1, *const end = line.data() + line.size();
  while (at != end) {
    // One byte holds the starts of 255 blocks.
    Block sums = {};
    const char* const stop = at + std::min<ptrdiff_t>(end - at, 255 * 16);
    for (; stop - at >= 16; at += 16) sums -= starts(at);
    if (at != stop) {
      static constexpr uint8_t kMask[32] = {255, 255, 255, 255, 255, 255, 255, 255,
                                            255, 255, 255, 255, 255, 255, 255, 255};
      char copy[17] = {};
      if (limit - at < 16) std::copy(at - 1, stop, copy);
      sums -= starts(limit - at < 16 ? copy + 1 : at) & load(kMask + 16 - (stop - at));
      at = stop;
    }
    uint64_t halves[2];
    std::memcpy(halves, &sums, sizeof halves);
    for (const uint64_t half : halves) {
      const uint64_t pairs = (half & 0x00ff00ff00ff00ff) + (half >> 8 & 0x00ff00ff00ff00ff);
      count += static_cast<int64_t>(pairs * 0x0001000100010001 >> 48);
    }
  }
  return count;
}

/// `text` in quotes, for a message of one line.
std::string quoted(std::string_view text) {
  std::string result = "'";
  for (const char c : text.substr(0, 20)) result += c >= ' ' && c <= '~' ? c : '?';
  return result + (text.size() > 20 ? "...'" : "'");
}

bool read_whole(std::string_view text, int64_t* value) {
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && stop == text.data() + text.size();
}

/// nan, inf or infinity, in any case.
bool read_word(std::string_view text, double* value) {
  std::string lower(text.substr(0, 9));
  for (char& c : lower) c |= 32;
  if (lower == "nan") return *value = std::numeric_limits<double>::quiet_NaN(), true;
  return *value = std::numeric_limits<double>::infinity(), lower == "inf" || lower == "infinity";
}

constexpr double kTens[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                            1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

/// What nearly every coordinate looks like, without a loop: one digit, a point, one to eight digits. See read_number;
/// null for any other form.
const char* read_short(const char* at, const char* end, double* value) {
  if (std::endian::native != std::endian::little || end - at < 12) return nullptr;
  const bool negative = *at == '-';
  at += negative;
  const unsigned first = static_cast<unsigned char>(*at - '0');
  if (first > 9 || at[1] != '.') return nullptr;
  uint64_t text;
  std::memcpy(&text, at + 2, sizeof text);
  text ^= 0x3030303030303030;  // digits are now 0 to 9, and the first is the lowest byte
  const int places = std::countr_zero((text | (text + 0x7676767676767676)) & 0x8080808080808080) / 8;
  at += 2 + places;
  if (places == 0 || !is_space(*at)) return nullptr;
  // Zeros go before the digits; then neighbours join to pairs, to fours, to one number.
  text <<= 64 - 8 * places;
  text = (text * 10 + (text >> 8)) & 0x00ff00ff00ff00ff;
  text = (text * 100 + (text >> 16)) & 0x0000ffff0000ffff;
  text = (text * 10000 + (text >> 32)) & 0xffffffff;
  // All three are exact as doubles, so the one division rounds correctly.
  const double digits = first * kTens[places] + static_cast<double>(static_cast<int64_t>(text));
  *value = (1 - 2 * negative) * digits / kTens[places];
  return at;
}

/// Read the number that begins at `at` < `end` and ends before a space or `end`; where it ends, or null when it is
/// none.
const char* read_number(const char* at, const char* end, double* value) {
  const bool negative = *at == '-';
  if (negative || *at == '+') ++at;
  const char* const start = at;
  uint64_t digits = 0;
  for (; at != end && is_digit(*at); ++at) digits = digits * 10 + (*at - '0');
  const char* const point = at;
  int64_t places = 0;
  if (at != end && *at == '.') {
    for (++at; at != end && is_digit(*at); ++at) digits = digits * 10 + (*at - '0');
    places = at - point - 1;
  }
  const int64_t length = point - start + places;
  if (length == 0) {
    const std::string_view word = field({start, static_cast<size_t>(end - start)});
    if (!read_word(word, value)) return nullptr;
    at = word.data() + word.size();
  } else {
    int64_t exponent = 0;
    if (at != end && (*at == 'e' || *at == 'E')) {
      ++at;
      const bool down = at != end && *at == '-';
      if (at != end && (*at == '-' || *at == '+')) ++at;
      const char* const first = at;
      for (; at != end && is_digit(*at); ++at) exponent = std::min<int64_t>(exponent * 10 + (*at - '0'), 1ll << 40);
      if (at == first) return nullptr;
      if (down) exponent = -exponent;
    }
    if (at != end && !is_space(*at)) return nullptr;
    const int64_t power = exponent - places;
    if (length <= 19 && digits <= 1ull << 53 && power >= -22 && power <= 22) {
      // Both are exact as doubles, so the one operation rounds correctly.
      const double whole = static_cast<double>(digits);
      *value = power < 0 ? whole / kTens[-power] : whole * kTens[power];
    } else if (std::from_chars(start, at, *value).ec == std::errc::result_out_of_range) {
      const char* first = start;
      while (*first == '0' || *first == '.') ++first;
      *value = point - first + exponent > 0 ? std::numeric_limits<double>::infinity() : 0.0;
    }
  }
  if (negative) *value = -*value;
  return at;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : rest_(text), end_(text.data() + text.size()) {}

  NtuText run() {
    if (read()) {
      while (found_.rest == 0 && next()) {
        if (!trimmed(line_).empty()) found_.rest = number_;
      }
    }
    return std::move(found_);
  }

 private:
  bool read() {
    if (!count("the number of frames", &found_.frames)) return false;
    for (int64_t frame = 0; frame < found_.frames; ++frame) {
      int64_t bodies;
      if (!count("the number of bodies of a frame", &bodies)) return false;
      for (; bodies > 0; --bodies) {
        if (!body(frame)) return false;
      }
    }
    return true;
  }

  bool body(int64_t frame) {
    int64_t id, joints;
    if (!next()) return ended("10 values of a body");
    if (const int64_t fields = count_fields(line_, end_); fields != kBodyFields) {
      return fail("expected 10 values of a body, got " + std::to_string(fields));
    }
    const std::string_view text = field(trimmed(line_));
    if (!read_whole(text, &id)) return fail("expected the id of a body, a whole number, got " + quoted(text));
    if (!count("the number of joints", &joints)) return false;
    if (joints != NtuText::kJoints) return fail("expected 25 joints, got " + std::to_string(joints));
    // Only now is there a line, so a count of bodies that no text follows takes no memory.
    found_.frame.push_back(frame);
    found_.body.push_back(id);
    found_.line.push_back(number_ + 1);
    float xyz[NtuText::kJoints * 3];
    for (int64_t joint = 0; joint < NtuText::kJoints; ++joint) {
      if (!coordinates(xyz + joint * 3)) return false;
    }
    found_.joints.insert(found_.joints.end(), std::begin(xyz), std::end(xyz));
    return true;
  }

  bool coordinates(float* xyz) {
    if (!next()) return ended("12 numbers of a joint");
    const char *at = line_.data(), *const end = at + line_.size(), *stop = nullptr;
    for (int axis = 0; axis < 3; ++axis, at = stop) {
      while (at != end && is_space(*at)) ++at;
      double value;
      stop = read_short(at, end, &value);
      if (stop == nullptr && at != end) stop = read_number(at, end, &value);
      if (stop == nullptr) {
        const int64_t fields = count_fields(line_, end_);
        if (fields != kJointFields) return miscounted(fields);
        return fail("expected a coordinate, got " + quoted(field({at, static_cast<size_t>(end - at)})));
      }
      xyz[axis] = static_cast<float>(value);
    }
    // Numbers that nobody needs are counted, not read.
    const int64_t fields = 3 + count_fields({at, static_cast<size_t>(end - at)}, end_);
    return fields == kJointFields || miscounted(fields);
  }

  bool miscounted(int64_t fields) { return fail("expected 12 numbers of a joint, got " + std::to_string(fields)); }

  bool next() {
    if (rest_.empty()) return false;
    ++number_;
    const auto* const stop = static_cast<const char*>(std::memchr(rest_.data(), '\n', rest_.size()));
    line_ = rest_.substr(0, stop == nullptr ? rest_.size() : stop - rest_.data());
    rest_.remove_prefix(std::min(line_.size() + 1, rest_.size()));
    return true;
  }

  bool count(const char* what, int64_t* value) {
    if (!next()) return ended(what);
    const std::string_view text = trimmed(line_);
    return (read_whole(text, value) && *value >= 0) || fail(std::string("expected ") + what + ", got " + quoted(text));
  }

  bool ended(const char* what) {
    ++number_;
    return fail(std::string("expected ") + what + ", got the end of the file");
  }

  bool fail(std::string message) {
    found_.error_line = number_;
    found_.error = std::move(message);
    return false;
  }

  std::string_view rest_, line_;
  const char* end_;
  int64_t number_ = 0;
  NtuText found_;
};

}  // namespace

NtuText parse_ntu(std::string_view text) { return Parser(text).run(); }

}  // namespace jmm_fast
