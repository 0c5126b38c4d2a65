// jmm_fast._host: what readers need in C++, numpy in and numpy out. It knows nothing of torch.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "host/ntu_text.h"
#include "host/scan_clips.h"
#include "host/text_rows.h"

namespace py = pybind11;

namespace {

std::string describe(const py::object& object) {
  if (!py::isinstance<py::array>(object)) return py::str(py::type::of(object).attr("__name__"));
  const auto array = py::reinterpret_borrow<py::array>(object);
  std::string text = py::str(array.dtype());
  text += " [";
  for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

/// A C-contiguous view of `object`, which must hold exactly `T` with `ndim` axes: nothing is converted silently.
template <typename T>
py::array_t<T, py::array::c_style> expect(const py::object& object, py::ssize_t ndim, const char* wanted) {
  if (!py::isinstance<py::array_t<T>>(object) || py::reinterpret_borrow<py::array>(object).ndim() != ndim) {
    throw py::value_error(std::string(wanted) + ", got " + describe(object));
  }
  return py::array_t<T, py::array::c_style>::ensure(object);
}

py::tuple scan_clips(const py::object& frames_in, const py::object& offsets_in, int threads) {
  const auto frames = expect<float>(frames_in, 3, "frames must be float32 [F,V,C]");
  const auto offsets = expect<int64_t>(offsets_in, 1, "offsets must be int64 [N+1]");
  if (threads < 0) throw py::value_error("threads must be 0 (one per core) or more, got " + std::to_string(threads));
  const int64_t count = offsets.shape(0) - 1, rows = frames.shape(0);
  if (count < 0) throw py::value_error("offsets must be int64 [N+1], got int64 [0]");
  const int64_t* bounds = offsets.data();
  if (bounds[0] < 0 || bounds[count] > rows) {
    throw py::value_error("offsets must lie in 0.." + std::to_string(rows) + " (the rows of frames), got " +
                          std::to_string(bounds[0]) + ".." + std::to_string(bounds[count]));
  }
  for (int64_t i = 0; i < count; ++i) {
    if (bounds[i + 1] < bounds[i]) {
      throw py::value_error("offsets must not decrease, but clip " + std::to_string(i) + " goes from " +
                            std::to_string(bounds[i]) + " to " + std::to_string(bounds[i + 1]));
    }
  }
  py::array_t<int64_t> nonfinite(count), zero_frames(count);
  py::array_t<float> max_abs(count);
  {
    const float* data = frames.data();
    int64_t *bad = nonfinite.mutable_data(), *zero = zero_frames.mutable_data();
    float* largest = max_abs.mutable_data();
    const int64_t width = frames.shape(1) * frames.shape(2);
    const py::gil_scoped_release release;
    jmm_fast::scan_clips(data, bounds, count, width, static_cast<unsigned>(threads), bad, zero, largest);
  }
  return py::make_tuple(nonfinite, zero_frames, max_abs);
}

template <typename T>
py::array_t<T> copied(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  return py::array_t<T>(std::move(shape), values.data());
}

py::tuple parse_ntu(const py::bytes& data) {
  const auto text = static_cast<std::string_view>(data);
  jmm_fast::NtuText found;
  {
    const py::gil_scoped_release release;
    found = jmm_fast::parse_ntu(text);
  }
  if (!found.error.empty()) throw py::value_error("line " + std::to_string(found.error_line) + ": " + found.error);
  const auto rows = static_cast<py::ssize_t>(found.frame.size());
  return py::make_tuple(found.frames, copied(found.frame, {rows}), copied(found.body, {rows}),
                        copied(found.line, {rows}), copied(found.joints, {rows, jmm_fast::NtuText::kJoints, 3}),
                        found.rest);
}

py::array_t<float> parse_rows(const py::bytes& data, int64_t columns) {
  if (columns < 1) throw py::value_error("columns must be at least 1, got " + std::to_string(columns));
  const std::string_view text(data);
  py::array_t<float> out({jmm_fast::row_capacity(text, columns), columns});
  int64_t rows;
  {
    float* values = out.mutable_data();
    const py::gil_scoped_release release;
    rows = jmm_fast::parse_rows(text, columns, values);
  }
  // Whatever was not refused fills its room.
  if (rows != out.shape(0)) throw std::logic_error("parse_rows counted its rows wrongly");
  return out;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Readers' helpers in C++: numpy in, numpy out.";
  module.def("scan_clips", &scan_clips, py::arg("frames"), py::arg("offsets"), py::kw_only(), py::arg("threads") = 0,
             R"(Look through every clip once.

Args:
    frames: float32 [F,V,C], all clips' rows one after the other.
    offsets: int64 [N+1], clip i is rows offsets[i] to offsets[i+1].
    threads: at most this many threads; 0 is one per core.

Returns:
    (nonfinite, zero_frames, max_abs): int64 [N] number of NaN or infinite values, int64 [N] number of frames whose
    values are all zero, float32 [N] largest absolute finite value (0 where there is none).

Raises:
    ValueError: a wrong type or shape, or offsets that decrease or leave the rows.

The result does not depend on the number of threads. The interpreter lock is released meanwhile.)");
  module.def("parse_ntu", &parse_ntu, py::arg("data"),
             R"(Read the text of an NTU RGB+D .skeleton file. A row is one body in one frame, in the order of the file.

Args:
    data: the file's bytes.

Returns:
    (frames, frame, body, line, joints, rest): int, the frames that the first line announces; int64 [rows] frame from 0;
    int64 [rows] id of the body; int64 [rows] line of the body's first joint, from 1; float32 [rows,25,3] metres, each
    the nearest double rounded to float; int, first line with text after the last frame, 0 where there is none.

Raises:
    ValueError: not such a text; one sentence begins with the line's number.

The interpreter lock is released meanwhile.)");
  module.def("parse_rows", &parse_rows, py::arg("data"), py::arg("columns"),
             R"(Numbers of a text, a line a row.

Args:
    data: bytes; numbers between blanks or single commas, lines end in LF or CRLF, blank lines at the end do not count.
    columns: numbers in every row.

Returns:
    float32 [rows, columns], rounded to double and then to float as numpy does; nan and inf are numbers.

Raises:
    ValueError: says which line is not `columns` numbers and why.

The interpreter lock is released meanwhile.)");
}
