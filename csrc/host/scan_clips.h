#pragma once

#include <cstdint>

namespace jmm_fast {

/// What a reader must know of one clip before it accepts it.
struct ClipScan {
  int64_t nonfinite;    ///< values that are NaN or infinite
  int64_t zero_frames;  ///< frames whose every value is zero
  float max_abs;        ///< largest absolute finite value; 0 for a clip without one
};

/// Scan rows `[begin, end)` of `frames`, each of `width` floats.
ClipScan scan_clip(const float* frames, int64_t begin, int64_t end, int64_t width);

/// Scan clips `offsets[i]` to `offsets[i + 1]` for i in [0, count), on up to `threads` threads (0: one per core).
void scan_clips(const float* frames, const int64_t* offsets, int64_t count, int64_t width, unsigned threads,
                int64_t* nonfinite, int64_t* zero_frames, float* max_abs);

}  // namespace jmm_fast
