// CPU implementations of jmm_fast::{norm_linear,linear_add,norm_mlp}_{forward,backward}; their schemas are defined in
// Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "block/cpu_kernel.h"
#include "isa.h"
#include "parallel.h"

namespace jmm_fast::block {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a task: what belongs to them should fit the second cache beside the weights' panels.
constexpr int64_t kForwardRows = 96;
constexpr int64_t kBackwardRows = 48;
// Rows between two rounds of weight gradients: their inputs (10 MB at the released size) should stay in the third
// cache. Even, and a multiple of kBackwardRows: a word may hold two rows.
constexpr int64_t kSpan = 480;
static_assert(kBackwardRows % 2 == 0 && kSpan % kBackwardRows == 0);

int64_t panel_width(Isa isa) { JMM_DISPATCH(isa, ::jmm_fast::block, panel_width()) }
bool has_half(Isa isa) { JMM_DISPATCH(isa, ::jmm_fast::block, has_half()) }
void pack(Isa isa, const Pack& p, int64_t panel){JMM_DISPATCH(isa, ::jmm_fast::block, pack(p, panel))} int64_t
    forward_scratch(Isa isa, const Forward& f,
                    int64_t rows){JMM_DISPATCH(isa, ::jmm_fast::block, forward_scratch(f, rows))} int64_t
    backward_scratch(Isa isa, const Backward& g, int64_t rows) {
  JMM_DISPATCH(isa, ::jmm_fast::block, backward_scratch(g, rows))
}
void forward(Isa isa, const Forward& f, float* scratch, int64_t begin, int64_t rows) {
  JMM_DISPATCH(isa, ::jmm_fast::block, forward(f, scratch, begin, rows))
}
void backward(Isa isa, const Backward& g, float* scratch, const Piece& piece) {
  JMM_DISPATCH(isa, ::jmm_fast::block, backward(g, scratch, piece))
}
void outer(Isa isa, const Outer& o, bool half, int64_t rows, int64_t panel) {
  JMM_DISPATCH(isa, ::jmm_fast::block, outer(o, half, rows, panel))
}

template <typename... Sizes>
Tensor empty(const Tensor& like, ScalarType dtype, Sizes... sizes) {
  const std::array<int64_t, sizeof...(sizes)> shape{sizes...};
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, dtype);
}

Tensor floats(const Tensor& like, int64_t count) { return empty(like, ScalarType::Float, count); }

float* data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

/// Contiguous float32 parameter of `shape`.
Tensor parameter(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool fits = tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float &&
              tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) fits = fits && tensor.size(i++) == size;
  STD_TORCH_CHECK(fits, name, " must be a float32 CPU tensor that fits the others");
  return torch::stable::contiguous(tensor);
}

/// The rows of a tensor `[.., columns]`, float32 or bfloat16, and what keeps them alive.
struct Rows {
  Rows() : matrix{nullptr, 0, false} {}
  Rows(const char* name, const Tensor& from, int64_t rows, int64_t columns) : Rows() {
    const ScalarType dtype = from.scalar_type();
    STD_TORCH_CHECK(from.is_cpu() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && from.dim() >= 1 &&
                        from.size(from.dim() - 1) == columns && from.numel() == rows * columns,
                    name, " must be a float32 or bfloat16 CPU tensor of ", rows, " rows of ", columns);
    tensor = torch::stable::contiguous(from);
    matrix = {tensor->data_ptr(), columns, dtype == ScalarType::BFloat16};
  }
  std::optional<Tensor> tensor;
  Matrix matrix;
};

int64_t columns_of(const Tensor& x) { return x.size(x.dim() - 1); }

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return rows;
}

/// Which rows of `total` are taken: int64, each at most once.
struct Chosen {
  Chosen(const std::optional<Tensor>& given, int64_t total) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(given->is_cpu() && given->scalar_type() == ScalarType::Long && given->dim() == 1,
                    "rows must be an int64 CPU tensor [M]");
    tensor = torch::stable::contiguous(*given);
    rows = static_cast<const int64_t*>(tensor->data_ptr());
    count = given->size(0);
    place.assign(static_cast<size_t>(total), -1);
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < total, "rows must be in [0, ", total, "), got ", rows[i]);
      STD_TORCH_CHECK(place[static_cast<size_t>(rows[i])] < 0, "rows must not repeat, got ", rows[i], " twice");
      place[static_cast<size_t>(rows[i])] = i;
    }
  }
  int64_t count_of(int64_t total) const { return rows != nullptr ? count : total; }
  std::optional<Tensor> tensor;
  const int64_t* rows = nullptr;
  std::vector<int64_t> place;  ///< of each of the `total` among the chosen, -1 for none
  int64_t count = 0;
};

/// Empty tensor of the shape of `x`, its last dimension replaced.
Tensor empty_rows(const Tensor& x, int64_t columns, ScalarType dtype) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(columns);
  return torch::stable::new_empty(x, {shape.data(), shape.size()}, dtype);
}

struct PackedWeight {
  PackedWeight(Isa isa, const Tensor& given, const std::optional<Tensor>& given_bias, bool forward, bool half,
               int64_t out, int64_t in)
      : words(given) {
    const Tensor weight = parameter("weight", given, {out, in});
    const int64_t columns = forward ? out : in, depth = forward ? in : out;
    const int64_t width = panel_width(isa), panels = (columns + width - 1) / width;
    const int64_t word_depth = half ? (depth + 1) / 2 : depth;
    words = floats(weight, panels * width * word_depth);
    const Pack p{data(weight), out, in, forward, half, data(words)};
    run_tasks(panels, [&](auto next) {
      for (int64_t panel; (panel = next()) < panels;) pack(isa, p, panel);
    });
    packed = {data(words), nullptr, word_depth, columns};
    if (given_bias.has_value()) {
      const Tensor from = parameter("bias", *given_bias, {columns});
      bias = floats(weight, panels * width);
      std::memset(data(*bias), 0, static_cast<size_t>(panels * width) * sizeof(float));
      std::memcpy(data(*bias), data(from), static_cast<size_t>(columns) * sizeof(float));
      packed.bias = data(*bias);
    }
  }
  Tensor words;
  std::optional<Tensor> bias;
  Packed packed{};
};

void run(Isa isa, const Forward& f, int64_t rows) {
  const int64_t tasks = (rows + kForwardRows - 1) / kForwardRows;
  const int64_t scratch = forward_scratch(isa, f, kForwardRows);
  run_tasks(tasks, [&](auto next) {
    float* own = thread_scratch(scratch);
    for (int64_t task; (task = next()) < tasks;) {
      const int64_t begin = task * kForwardRows;
      forward(isa, f, own, begin, std::min(kForwardRows, rows - begin));
    }
  });
}

/// Storage behind an Outer, twice: one span is filled while the one before it is used. And the gradient at its end.
struct Gradient {
  Gradient(Isa isa, const Tensor& like, int64_t left, int64_t right, int64_t rows, bool half)
      : left_storage(like), right_storage(like), sum_storage(like) {
    const int64_t width = panel_width(isa), span = std::min(kSpan, round_up(rows, 2));
    // One cache line more: see kStride of the kernel.
    const int64_t left_stride = round_up(left, width) + 16, right_stride = round_up(right, width);
    Outer outer{};
    outer.left_columns = left, outer.right_columns = right, outer.left_stride = left_stride;
    outer.span = half ? span / 2 : span;
    outer.sum_stride = right_stride;
    left_storage = floats(like, 2 * outer.span * left_stride);
    right_storage = floats(like, 2 * outer.span * right_stride);
    sum_storage = floats(like, left * right_stride);
    outer.sum = data(sum_storage);
    std::memset(outer.sum, 0, static_cast<size_t>(left * right_stride) * sizeof(float));
    for (int64_t i = 0; i < 2; ++i) {
      outer.left = data(left_storage) + i * outer.span * left_stride;
      outer.right = data(right_storage) + i * outer.span * right_stride;
      outers[static_cast<size_t>(i)] = outer;
    }
  }
  /// The sum, or its transpose.
  Tensor result(bool transposed) const {
    const Outer& outer = outers[0];
    const int64_t m = outer.left_columns, n = outer.right_columns;
    Tensor out = transposed ? empty(sum_storage, ScalarType::Float, n, m) : empty(sum_storage, ScalarType::Float, m, n);
    float* to = data(out);
    constexpr int64_t kTile = 16;
    const int64_t tasks = (n + kTile - 1) / kTile;
    run_tasks(tasks, [&](auto next) {
      for (int64_t task; (task = next()) < tasks;) {
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = task * kTile; j < std::min(n, (task + 1) * kTile); ++j) {
            to[transposed ? j * m + i : i * n + j] = outer.sum[i * outer.sum_stride + j];
          }
        }
      }
    });
    return out;
  }
  std::array<Outer, 2> outers;
  Tensor left_storage, right_storage, sum_storage;
};

void wait_for(const std::atomic<int64_t>& done, int64_t count) {
  for (int tries = 0; done.load(std::memory_order_acquire) < count; ++tries) {
    // The thread waited for may want this very core.
    if (tries > 100) std::this_thread::yield();
  }
}

/// Runs all rows; returns the sums over rows that pieces report, `count` numbers. `gradient2` is the MLP's second.
///
/// Rows go by in spans: pieces of a span leave their inputs of the weights' gradients in its storage, then the products
/// of the span are added, panel by panel. The pieces of the next span come before these products in the order of tasks,
/// so that a thread that is held up does not make the others wait for it at once, as a barrier after each part would.
Tensor run(Isa isa, const Backward& given, const Gradient& gradient, const Gradient* gradient2, const Tensor& like,
           int64_t rows, int64_t count) {
  std::array<Backward, 2> both{given, given};
  for (size_t i = 0; i < 2; ++i) {
    both[i].outer = gradient.outers[i];
    if (gradient2 != nullptr) both[i].outer2 = gradient2->outers[i];
  }
  const int64_t pieces = (rows + kBackwardRows - 1) / kBackwardRows, spans = (rows + kSpan - 1) / kSpan;
  constexpr int64_t kPieces = kSpan / kBackwardRows;
  const Tensor partial = floats(like, pieces * count);
  const int64_t scratch = backward_scratch(isa, both[0], kBackwardRows);
  const int64_t width = panel_width(isa);
  const int64_t panels = (both[0].outer.right_columns + width - 1) / width;
  const int64_t panels2 = (both[0].outer2.right_columns + width - 1) / width;

  // Stage 2 s: pieces of span s + 1 (stage -1: of span 0). Stage 2 s + 1: products of span s.
  std::vector<int64_t> ends;
  std::vector<int64_t> pieces_of;
  for (int64_t span = 0; span < spans; ++span) pieces_of.push_back(std::min(kPieces, pieces - span * kPieces));
  int64_t total = 0;
  for (int64_t span = 0; span < spans; ++span) {
    ends.push_back(total +=
                   (span == 0 ? pieces_of[0] : 0) + (span + 1 < spans ? pieces_of[static_cast<size_t>(span) + 1] : 0));
    ends.push_back(total += panels + panels2);
  }
  std::vector<std::atomic<int64_t>> filled(static_cast<size_t>(spans)), used(static_cast<size_t>(spans));
  run_tasks(total, [&](auto next) {
    float* own = thread_scratch(scratch);
    size_t stage = 0;
    for (int64_t task; (task = next()) < total;) {
      while (task >= ends[stage]) ++stage;
      const int64_t item = task - (stage == 0 ? 0 : ends[stage - 1]);
      if (stage % 2 == 1) {
        const size_t span = stage / 2;
        const Backward& g = both[span % 2];
        wait_for(filled[span], pieces_of[span]);
        if (span > 0) wait_for(used[span - 1], panels + panels2);
        const int64_t of_span = std::min(kSpan, rows - static_cast<int64_t>(span) * kSpan);
        if (item < panels) {
          outer(isa, g.outer, g.half, of_span, item);
        } else {
          outer(isa, g.outer2, g.half, of_span, item - panels);
        }
        used[span].fetch_add(1, std::memory_order_release);
      } else {
        const int64_t number = stage == 0 ? item : static_cast<int64_t>(stage / 2 + 1) * kPieces + item;
        const auto span = static_cast<size_t>(number / kPieces);
        if (span >= 2) wait_for(used[span - 2], panels + panels2);
        const int64_t begin = number * kBackwardRows;
        backward(isa, both[span % 2], own,
                 {begin, std::min(kBackwardRows, rows - begin), begin % kSpan, data(partial) + number * count});
        filled[span].fetch_add(1, std::memory_order_release);
      }
    }
  });

  const Tensor sums = floats(like, count);
  std::vector<double> sum(static_cast<size_t>(count));
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const float* from = data(partial) + piece * count;
    for (int64_t i = 0; i < count; ++i) sum[static_cast<size_t>(i)] += from[i];
  }
  for (int64_t i = 0; i < count; ++i) data(sums)[i] = static_cast<float>(sum[static_cast<size_t>(i)]);
  return sums;
}

/// Its own tensor for `count` of the `sums`, from `begin` on.
Tensor part(const Tensor& sums, int64_t begin, int64_t count) {
  Tensor out = floats(sums, count);
  std::memcpy(data(out), data(sums) + begin, static_cast<size_t>(count) * sizeof(float));
  return out;
}

struct NormParameters {
  NormParameters(const Tensor& weight_in, const Tensor& bias_in, int64_t width, double eps)
      : weight(parameter("norm_weight", weight_in, {width})), bias(parameter("norm_bias", bias_in, {width})) {
    norm = {data(weight), data(bias), static_cast<float>(eps)};
  }
  Tensor weight, bias;
  Norm norm;
};

ScalarType type(bool half) { return half ? ScalarType::BFloat16 : ScalarType::Float; }

Tensor norm_linear_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight,
                           std::optional<Tensor> bias, double eps, bool half) {
  const Isa isa = active_isa();
  const int64_t rows = rows_of(x), width = columns_of(x), out = weight.size(0);
  const bool pairs = half && has_half(isa);
  const Rows from("x", x, rows, width);
  const NormParameters norm(norm_weight, norm_bias, width, eps);
  const PackedWeight first(isa, weight, bias, true, pairs, out, width);
  Tensor y = empty_rows(x, out, type(half));
  Forward f{};
  f.x = from.matrix, f.y = {y.data_ptr(), out, half}, f.norm = norm.norm, f.first = first.packed, f.half = pairs;
  run(isa, f, rows);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_linear_backward(
    const Tensor& grad, std::optional<Tensor> grad_k, std::optional<Tensor> grad_v, std::optional<Tensor> base,
    std::optional<Tensor> base_rows, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& weight, double eps) {
  const Isa isa = active_isa();
  const int64_t rows = rows_of(x), width = columns_of(x);
  const bool half = grad.scalar_type() == ScalarType::BFloat16;
  const bool pairs = half && has_half(isa);
  const Rows q("grad", grad, rows, columns_of(grad));
  const Rows k = grad_k.has_value() ? Rows("grad_k", *grad_k, rows, columns_of(*grad_k)) : Rows();
  const Rows v = grad_v.has_value() ? Rows("grad_v", *grad_v, rows, columns_of(*grad_v)) : Rows();
  const int64_t out = q.matrix.columns + k.matrix.columns + v.matrix.columns;
  const Chosen based(base.has_value() ? base_rows : std::nullopt, rows);
  const Rows from("x", x, rows, width),
      added = base.has_value() ? Rows("base", *base, based.count_of(rows), width) : Rows();
  const NormParameters norm(norm_weight, norm_bias, width, eps);
  const PackedWeight first(isa, weight, std::nullopt, false, pairs, out, width);
  const Gradient gradient(isa, x, width, out, rows, pairs);
  Tensor dx = empty_rows(x, width, ScalarType::Float);
  Backward g{};
  g.grad[0] = q.matrix, g.grad[1] = k.matrix, g.grad[2] = v.matrix, g.base = added.matrix, g.x = from.matrix;
  if (based.rows != nullptr) g.base_source = based.place.data();
  g.dx = {dx.data_ptr(), width, false}, g.norm = norm.norm, g.first = first.packed;
  g.half = pairs;
  const Tensor sums = run(isa, g, gradient, nullptr, x, rows, 2 * width + out);
  return {dx, part(sums, 0, width), part(sums, width, width), gradient.result(true), part(sums, 2 * width, out)};
}

Tensor linear_add_forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, std::optional<Tensor> rows_in) {
  const Isa isa = active_isa();
  const int64_t total = rows_of(x), width = columns_of(x), out = weight.size(0);
  const bool pairs = x.scalar_type() == ScalarType::BFloat16 && has_half(isa);
  const Rows from("x", x, total, width),
      added = residual.has_value() ? Rows("residual", *residual, total, out) : Rows();
  const Chosen chosen(rows_in, total);
  const PackedWeight first(isa, weight, bias, true, pairs, out, width);
  Tensor y =
      chosen.rows != nullptr ? empty(x, ScalarType::Float, chosen.count, out) : empty_rows(x, out, ScalarType::Float);
  Forward f{};
  f.x = from.matrix, f.residual = added.matrix, f.y = {y.data_ptr(), out, false}, f.source = chosen.rows;
  f.first = first.packed, f.half = pairs;
  run(isa, f, chosen.count_of(total));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_add_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       std::optional<Tensor> rows_in) {
  const Isa isa = active_isa();
  const int64_t total = rows_of(x), width = columns_of(x), out = weight.size(0);
  const bool half = x.scalar_type() == ScalarType::BFloat16, pairs = half && has_half(isa);
  const Chosen chosen(rows_in, total);
  const int64_t rows = chosen.count_of(total);
  const Rows given("grad", grad, rows, out), from("x", x, total, width);
  const PackedWeight first(isa, weight, std::nullopt, false, pairs, out, width);
  const Gradient gradient(isa, x, out, width, rows, pairs);
  Tensor dx = empty_rows(x, width, type(half));
  const auto row_bytes = static_cast<size_t>(width) * (half ? 2 : 4);
  for (int64_t i = 0; chosen.rows != nullptr && i < total; ++i) {
    if (chosen.place[static_cast<size_t>(i)] < 0) {
      std::memset(static_cast<char*>(dx.data_ptr()) + static_cast<size_t>(i) * row_bytes, 0, row_bytes);
    }
  }
  Backward g{};
  g.grad[0] = given.matrix, g.x = from.matrix, g.dx = {dx.data_ptr(), width, half}, g.source = chosen.rows;
  g.first = first.packed, g.half = pairs;
  const Tensor sums = run(isa, g, gradient, nullptr, x, rows, out);
  return {dx, gradient.result(false), sums};
}

Tensor norm_mlp_forward(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight1,
                        const Tensor& bias1, const Tensor& weight2, const Tensor& bias2, double eps, bool half,
                        bool add) {
  const Isa isa = active_isa();
  const int64_t rows = rows_of(x), width = columns_of(x), hidden = weight1.size(0), out = weight2.size(0);
  STD_TORCH_CHECK(!add || out == width, "weight2 must have as many rows as x has columns to be added to it");
  const bool pairs = half && has_half(isa);
  const Rows from("x", x, rows, width);
  const NormParameters norm(norm_weight, norm_bias, width, eps);
  const PackedWeight first(isa, weight1, bias1, true, pairs, hidden, width);
  const PackedWeight second(isa, weight2, bias2, true, pairs, out, hidden);
  Tensor y = empty_rows(x, out, ScalarType::Float);
  Forward f{};
  f.x = from.matrix, f.y = {y.data_ptr(), out, false}, f.norm = norm.norm, f.first = first.packed;
  if (add) f.residual = from.matrix;
  f.second = second.packed, f.half = pairs;
  run(isa, f, rows);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& weight1,
    const Tensor& bias1, const Tensor& weight2, double eps, bool half, bool add) {
  const Isa isa = active_isa();
  const int64_t rows = rows_of(x), width = columns_of(x), hidden = weight1.size(0), out = weight2.size(0);
  STD_TORCH_CHECK(!add || out == width, "weight2 must have as many rows as x has columns to be added to it");
  const bool pairs = half && has_half(isa);
  const Rows given("grad", grad, rows, out), from("x", x, rows, width);
  const NormParameters norm(norm_weight, norm_bias, width, eps);
  const PackedWeight again(isa, weight1, bias1, true, pairs, hidden, width);
  const PackedWeight second(isa, weight2, std::nullopt, false, pairs, out, hidden);
  const PackedWeight first(isa, weight1, std::nullopt, false, pairs, hidden, width);
  const Gradient gradient1(isa, x, width, hidden, rows, pairs), gradient2(isa, x, out, hidden, rows, pairs);
  Tensor dx = empty_rows(x, width, ScalarType::Float);
  Backward g{};
  g.grad[0] = given.matrix, g.x = from.matrix, g.dx = {dx.data_ptr(), width, false}, g.norm = norm.norm;
  if (add) g.base = given.matrix;
  g.again = again.packed, g.second = second.packed, g.first = first.packed;
  g.half = pairs;
  const Tensor sums = run(isa, g, gradient1, &gradient2, x, rows, 2 * width + hidden + out);
  return {dx,
          part(sums, 0, width),
          part(sums, width, width),
          gradient1.result(true),
          part(sums, 2 * width, hidden),
          gradient2.result(false),
          part(sums, 2 * width + hidden, out)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jmm_fast, CPU, m) {
  m.impl("norm_linear_forward", TORCH_BOX(&norm_linear_forward));
  m.impl("norm_linear_backward", TORCH_BOX(&norm_linear_backward));
  m.impl("linear_add_forward", TORCH_BOX(&linear_add_forward));
  m.impl("linear_add_backward", TORCH_BOX(&linear_add_backward));
  m.impl("norm_mlp_forward", TORCH_BOX(&norm_mlp_forward));
  m.impl("norm_mlp_backward", TORCH_BOX(&norm_mlp_backward));
}

}  // namespace jmm_fast::block
