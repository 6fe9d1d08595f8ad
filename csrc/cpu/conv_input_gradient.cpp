// conv2d_input_gradient: the gradient of a 2-D convolution in an input of few channels.
//
// A cell is a block of m x m pixels of the input, m = q stride, with all their channels. The same T x T pixels of the
// output's gradient g reach each of a cell's elements, T = q + floor((kernel - 1) / stride), so a row of cells is a
// matrix product,
//
//   cell (a, b) = sum over taps (s, t), channels c:  g[c, a q + q - 1 - s, b q + q - 1 - t] W[s, t, c]
//
// where W[s, t, c] has an element for each of a cell's: w[c, :, ky, kx] with ky = y - stride (q - 1 - s) for the
// cell's row y, likewise kx, and 0 where the kernel has none. A q above 1 fills the vectors where m^2 channels would
// not.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "data.h"
#include "empty.h"
#include "kernels.h"
#include "simd.h"

namespace gpkernels::cpu {
namespace {

constexpr int64_t kVectorBytes = 64;

// One spatial dimension.
struct Axis {
  int64_t input, output, kernel, stride, padding;
  int64_t q, cell, taps;
  int64_t first, cells;  // the cells that hold pixels of the input

  void cut(int64_t blocks) {
    q = blocks;
    cell = q * stride;
    taps = q + (kernel - 1) / stride;
    first = padding / cell;
    cells = (input - 1 + padding) / cell - first + 1;
  }
};

struct Problem {
  int64_t batch, in_channels, out_channels;
  Axis y, x;
  bool channels_last_grad, channels_last_input;
  int64_t width;   // elements of a cell, filled up to whole vectors
  int64_t pixels;  // of g that a packed row holds
  int64_t pixel_stride, channel_stride;

  int64_t elements() const {
    return y.cell * x.cell * in_channels;
  }
};

template <class T>
int64_t whole_vectors(int64_t elements) {
  constexpr int64_t lanes = kVectorBytes / static_cast<int64_t>(sizeof(T));
  return (elements + lanes - 1) / lanes * lanes;
}

// Cells of the size that takes the fewest multiplications for a pixel.
template <class T>
void choose_cells(Problem& p) {
  double best = 0;
  int64_t chosen = 0;
  for (int64_t q = 1; q <= 4; ++q) {
    p.y.cut(q);
    p.x.cut(q);
    const double work = static_cast<double>(whole_vectors<T>(p.elements()) * p.y.taps * p.x.taps) /
                        static_cast<double>(p.y.cell * p.x.cell);
    if (chosen == 0 || work < best) best = work, chosen = q;
  }
  p.y.cut(chosen);
  p.x.cut(chosen);
  p.width = whole_vectors<T>(p.elements());
}

// A row of cells to compute: the packed rows of g for the taps that lie inside g, and where the cells go.
template <class T>
struct CellRow {
  const T* const* rows;  // of tap s, from which cell 0 reads its taps in reverse
  int64_t first_tap, last_tap;
  const T* weights;
  T* out;  // (cells, width)
};

// kCells cells by kVectors vectors of their elements.
template <class T, int kBytes, int kCells, int kVectors>
[[gnu::always_inline]] inline void tile(const Problem& p, const CellRow<T>& row, int64_t cell, int64_t column) {
  // unaligned, and of any type's memory
  typedef T Vec __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  constexpr int lanes = kBytes / static_cast<int>(sizeof(T));
  constexpr int kReach = 3;  // cells for which one pointer serves, at offsets that x86 addresses scale by themselves
  constexpr int kPointers = (kCells + kReach - 1) / kReach;
  Vec sums[kCells][kVectors] = {};
  const int64_t step = p.x.q * p.pixel_stride;
  for (int64_t s = row.first_tap; s < row.last_tap; ++s)
    for (int64_t t = 0; t < p.x.taps; ++t) {
      const T* g[kPointers];
      for (int k = 0; k < kPointers; ++k)
        g[k] = row.rows[s] + (cell * p.x.q + p.x.taps - 1 - t) * p.pixel_stride + k * kReach * step;
      const T* w = row.weights + (s * p.x.taps + t) * p.out_channels * p.width + column;
      for (int64_t c = 0; c < p.out_channels; ++c, w += p.width) {
        Vec weight[kVectors];
        for (int v = 0; v < kVectors; ++v) weight[v] = *reinterpret_cast<const Vec*>(w + v * lanes);
        for (int i = 0; i < kCells; ++i) {
          const T value = g[i / kReach][i % kReach * step];
          for (int v = 0; v < kVectors; ++v) sums[i][v] += weight[v] * value;
        }
        for (int k = 0; k < kPointers; ++k) g[k] += p.channel_stride;
      }
    }
  for (int i = 0; i < kCells; ++i)
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<Vec*>(row.out + (cell + i) * p.width + column + v * lanes) = sums[i][v];
}

// Cells in a tile of kVectors vectors, of three sizes that the registers hold: those that make a row the fastest.
template <int kRegisters, int kVectors>
struct TileCells {
  static constexpr int most = std::min((kRegisters - kVectors - 1) / kVectors, 12);

  // What a row takes: every tile loads the weights, and the last may pass the end.
  static int64_t cost(int64_t cells, int64_t size) {
    return (cells + size - 1) / size * (size + 1);
  }

  static int64_t best(int64_t cells) {
    int64_t best = most;
    for (int64_t size : {most - 1, most - 3})
      if (size > 0 && cost(cells, size) < cost(cells, best)) best = size;
    return best;
  }

  static int64_t least_cost(int64_t cells) {
    return cost(cells, best(cells));
  }
};

template <class T, int kBytes, int kRegisters, int kVectors>
[[gnu::always_inline]] inline void columns(const Problem& p, const CellRow<T>& row, int64_t column) {
  using Cells = TileCells<kRegisters, kVectors>;
  const int64_t size = Cells::best(p.x.cells);
  for (int64_t cell = 0; cell < p.x.cells; cell += size) {
    if (size == Cells::most)
      tile<T, kBytes, Cells::most, kVectors>(p, row, cell, column);
    else if (size == Cells::most - 1)
      tile<T, kBytes, Cells::most - 1, kVectors>(p, row, cell, column);
    else
      tile<T, kBytes, Cells::most - 3, kVectors>(p, row, cell, column);
  }
}

constexpr int64_t kMostCells = 12;  // by which a tile may pass the end of a row

// Vectors in a tile: as many as leave a row of cells the fastest.
template <int kRegisters>
int64_t most_vectors(int64_t cells) {
  if constexpr (kRegisters < 32) return 2;
  const int64_t two = TileCells<kRegisters, 2>::least_cost(cells), three = TileCells<kRegisters, 3>::least_cost(cells);
  const int64_t four = TileCells<kRegisters, 4>::least_cost(cells);
  return four <= std::min(two, three) ? 4 : three <= two ? 3 : 2;
}

template <class T, int kBytes, int kRegisters>
[[gnu::always_inline]] inline void compute_row(const Problem& p, const CellRow<T>& row) {
  constexpr int64_t lanes = kBytes / static_cast<int64_t>(sizeof(T));
  const int64_t most = most_vectors<kRegisters>(p.x.cells);
  int64_t left = p.width / lanes, tiles = (left + most - 1) / most;
  for (int64_t column = 0; tiles > 0; --tiles) {
    const int64_t vectors = (left + tiles - 1) / tiles;
    if constexpr (kRegisters == 32) {
      if (vectors == 4) columns<T, kBytes, kRegisters, 4>(p, row, column);
      if (vectors == 3) columns<T, kBytes, kRegisters, 3>(p, row, column);
    }
    if (vectors == 2) columns<T, kBytes, kRegisters, 2>(p, row, column);
    if (vectors == 1) columns<T, kBytes, kRegisters, 1>(p, row, column);
    column += vectors * lanes;
    left -= vectors;
  }
}

template <class T>
using ComputeRow = void (*)(const Problem&, const CellRow<T>&);

template <class T>
void compute_row_baseline(const Problem& p, const CellRow<T>& row) {
  compute_row<T, 16, 16>(p, row);
}

#if GPK_HAS_MULTIVERSION
template <class T>
__attribute__((target("arch=x86-64-v3"))) void compute_row_v3(const Problem& p, const CellRow<T>& row) {
  compute_row<T, 32, 16>(p, row);
}

template <class T>
__attribute__((target("arch=x86-64-v4"))) void compute_row_v4(const Problem& p, const CellRow<T>& row) {
  compute_row<T, 64, 32>(p, row);
}
#endif

// The tile's shape follows the registers of the machine, so the three levels are functions of their own.
template <class T>
ComputeRow<T> compute_row_here() {
#if GPK_HAS_MULTIVERSION
  if (__builtin_cpu_supports("x86-64-v4")) return compute_row_v4<T>;
  if (__builtin_cpu_supports("x86-64-v3")) return compute_row_v3<T>;
#endif
  return compute_row_baseline<T>;
}

template <class T>
std::vector<T> arrange_weights(const Problem& p, const Tensor& weight) {
  const auto strides = weight.strides();
  const T* w = data<T>(weight);
  std::vector<T> arranged(p.y.taps * p.x.taps * p.out_channels * p.width);
  T* out = arranged.data();
  for (int64_t s = 0; s < p.y.taps; ++s)
    for (int64_t t = 0; t < p.x.taps; ++t)
      for (int64_t c = 0; c < p.out_channels; ++c, out += p.width)
        for (int64_t y = 0; y < p.y.cell; ++y)
          for (int64_t x = 0; x < p.x.cell; ++x) {
            const int64_t ky = y - p.y.stride * (p.y.q - 1 - s), kx = x - p.x.stride * (p.x.q - 1 - t);
            if (ky < 0 || ky >= p.y.kernel || kx < 0 || kx >= p.x.kernel) continue;
            for (int64_t i = 0; i < p.in_channels; ++i)
              out[(y * p.x.cell + x) * p.in_channels + i] =
                  w[c * strides[0] + i * strides[1] + ky * strides[2] + kx * strides[3]];
          }
  return arranged;
}

// Rows of g with zeros on both sides, each packed once: the rows of cell row a are those of a - 1 and q more.
template <class T>
class PackedRows {
 public:
  PackedRows(const Problem& problem, const T* grad)
      : p(problem),
        g(grad),
        row_size(p.pixels * p.out_channels),
        buffer(p.y.taps * row_size),
        held(p.y.taps, -1),
        rows(p.y.taps) {
  }

  CellRow<T> at(int64_t sample, int64_t a, const T* weights, T* out) {
    const int64_t last = a * p.y.q + p.y.q - 1;  // the row of tap 0
    const int64_t first_tap = std::max<int64_t>(0, last - (p.y.output - 1));
    const int64_t last_tap = std::min(p.y.taps, last + 1);
    for (int64_t s = first_tap; s < last_tap; ++s) rows[s] = packed(sample, last - s);
    return {rows.data(), first_tap, std::max(first_tap, last_tap), weights, out};
  }

 private:
  const T* packed(int64_t sample, int64_t row) {
    const int64_t slot = row % p.y.taps, name = sample * p.y.output + row;
    T* to = buffer.data() + slot * row_size;
    if (held[slot] == name) return to;
    held[slot] = name;
    // the first pixel held is the last tap of the first cell
    const int64_t origin = p.x.first * p.x.q + p.x.q - p.x.taps;
    const int64_t begin = std::max<int64_t>(0, origin), end = std::min(p.x.output, origin + p.pixels);
    const int64_t count = std::max<int64_t>(0, end - begin), skip = begin - origin;
    if (p.channels_last_grad) {
      const T* from = g + (name * p.x.output + begin) * p.out_channels;
      std::copy(from, from + count * p.out_channels, to + skip * p.out_channels);
    } else {
      const T* from = g + ((sample * p.out_channels * p.y.output) + row) * p.x.output + begin;
      for (int64_t c = 0; c < p.out_channels; ++c, from += p.y.output * p.x.output)
        std::copy(from, from + count, to + c * p.pixels + skip);
    }
    return to;
  }

  const Problem& p;
  const T* g;
  int64_t row_size;
  std::vector<T> buffer;  // its borders stay zero
  std::vector<int64_t> held;
  std::vector<const T*> rows;
};

constexpr int64_t kPiece = 4;

// The elements of a row of cells to their pixels in the input's gradient.
template <class T>
void place(const Problem& p, int64_t sample, int64_t a, const T* cells, T* line, T* out) {
  const int64_t run = p.x.cell * p.in_channels, plane = p.y.input * p.x.input;
  const int64_t skip = (p.x.padding - p.x.first * p.x.cell) * p.in_channels;
  for (int64_t y = 0; y < p.y.cell; ++y) {
    const int64_t row = a * p.y.cell + y - p.y.padding;
    if (row < 0 || row >= p.y.input) continue;
    for (int64_t b = 0; b < p.x.cells; ++b) {
      const T* from = cells + b * p.width + y * run;
      // whole pieces: what one writes too much the next cell overwrites
      for (int64_t i = 0; i < run; i += kPiece) std::memcpy(line + b * run + i, from + i, kPiece * sizeof(T));
    }
    const T* from = line + skip;
    if (p.channels_last_input) {
      std::copy(from, from + p.x.input * p.in_channels, out + (sample * plane + row * p.x.input) * p.in_channels);
    } else {
      T* to = out + sample * p.in_channels * plane + row * p.x.input;
      for (int64_t i = 0; i < p.in_channels; ++i, to += plane)
        for (int64_t x = 0; x < p.x.input; ++x) to[x] = from[x * p.in_channels + i];
    }
  }
}

template <class T>
void run(Problem p, const Tensor& grad, const Tensor& weight, Tensor& out) {
  choose_cells<T>(p);
  p.pixels = (p.x.cells + kMostCells) * p.x.q + p.x.taps;
  p.pixel_stride = p.channels_last_grad ? p.out_channels : 1;
  p.channel_stride = p.channels_last_grad ? 1 : p.pixels;
  const std::vector<T> weights = arrange_weights<T>(p, weight);
  const ComputeRow<T> compute = compute_row_here<T>();
  const T* g = data<T>(grad);
  T* to = mutable_data<T>(out);
  torch::stable::parallel_for(0, p.batch * p.y.cells, 1, [&](int64_t first, int64_t last) {
    PackedRows<T> rows(p, g);
    std::vector<T> cells((p.x.cells + kMostCells) * p.width), line(p.x.cells * p.x.cell * p.in_channels + kPiece);
    for (int64_t task = first; task < last; ++task) {
      const int64_t sample = task / p.y.cells, a = p.y.first + task % p.y.cells;
      compute(p, rows.at(sample, a, weights.data(), cells.data()));
      place(p, sample, a, cells.data(), line.data(), to);
    }
  });
}

}  // namespace

Tensor conv2d_input_gradient(const Tensor& grad_out, const Tensor& weight, const Tensor& input,
                             const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  check_dense("grad_out", grad_out);
  check_dense("input", input);
  check_device("weight", weight, DeviceType::CPU);
  STD_TORCH_CHECK(grad_out.dim() == 4 && weight.dim() == 4 && input.dim() == 4,
                  "conv2d_input_gradient: wanted three tensors of 4 dimensions, got ", grad_out.dim(), ", ",
                  weight.dim(), " and ", input.dim());
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2, "stride, padding: wanted 2 numbers each, got ",
                  stride.size(), " and ", padding.size());
  STD_TORCH_CHECK(weight.scalar_type() == grad_out.scalar_type() && input.scalar_type() == grad_out.scalar_type(),
                  "weight, input: wanted the dtype of grad_out, got another");
  Problem p{};
  p.batch = input.size(0), p.in_channels = input.size(1), p.out_channels = weight.size(0);
  Axis* axes[] = {&p.y, &p.x};
  for (int d = 0; d < 2; ++d) {
    Axis& axis = *axes[d];
    axis.input = input.size(2 + d), axis.output = grad_out.size(2 + d), axis.kernel = weight.size(2 + d);
    axis.stride = stride[d], axis.padding = padding[d];
    STD_TORCH_CHECK(axis.stride >= 1 && axis.padding >= 0, "stride, padding: wanted at least 1 and 0, got ",
                    axis.stride, " and ", axis.padding);
    STD_TORCH_CHECK(axis.output == (axis.input + 2 * axis.padding - axis.kernel) / axis.stride + 1,
                    "grad_out: wanted the size of the convolution's output, got ", axis.output);
  }
  STD_TORCH_CHECK(grad_out.size(0) == p.batch && grad_out.size(1) == p.out_channels && weight.size(1) == p.in_channels,
                  "conv2d_input_gradient: wanted one batch and one number of channels each side, got others");
  p.channels_last_grad = !grad_out.is_contiguous();
  p.channels_last_input = !input.is_contiguous();
  Tensor out = new_result_like(input);
  if (input.numel() == 0) return out;
  if (grad_out.scalar_type() == ScalarType::Double) {
    run<double>(p, grad_out, weight, out);
  } else {
    STD_TORCH_CHECK(grad_out.scalar_type() == ScalarType::Float,
                    "grad_out: wanted float32 or float64, got another dtype");
    run<float>(p, grad_out, weight, out);
  }
  return out;
}

}  // namespace gpkernels::cpu
