#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace jmm_fast {

/// What an NTU RGB+D `.skeleton` text holds; a row is one body in one frame, in the order of the file.
struct NtuText {
  static constexpr int64_t kJoints = 25;

  int64_t frames = 0;          ///< as the first line says
  std::vector<int64_t> frame;  ///< `[rows]`, from 0
  std::vector<int64_t> body;   ///< `[rows]`, the sensor's id of the body
  std::vector<int64_t> line;   ///< `[rows]`, line of the body's first joint, from 1
  std::vector<float> joints;   ///< `[rows, 25, 3]` metres; NaN and infinity where the text says so
  int64_t rest = 0;            ///< first line with text after the last frame; 0: there is none
  int64_t error_line = 0;      ///< where `error` is
  std::string error;           ///< what was expected there; empty when all is well
};

/// Parse `text`, which may be any bytes. Memory is bounded by the length of the text, whatever counts it claims.
/// Coordinates are rounded to the nearest double and from there to float, as numpy does.
NtuText parse_ntu(std::string_view text);

}  // namespace jmm_fast
