// Batch norm in float32, forward and backward, with the ReLU that may follow.
//
// Each is two passes over the arrays: the sums over the batch, then what is made of them. Sums are of floats within some
// kilobytes and of doubles beyond. Where channels are fewer than a vector's, a row here is several pixels.

#include "convolution.h"

extern "C" struct BatchNorm {
  int64_t rows, channels, relu;  // channels: a multiple of 16 or a divisor of it; rows * channels: a multiple of 16
  double epsilon;
  int64_t threads;  // 0 for OpenMP's
  float *x, *scale, *bias, *y, *mean, *variance, *y_grad, *x_grad, *scale_grad, *bias_grad;
};

namespace {

constexpr int64_t IN_L1 = 4096;      // floats
constexpr int64_t CACHED = 3 << 20;  // floats of a result that may stay in L3 for whoever reads it

struct Shape {
  int64_t rows, width;  // as they are walked through: width is a multiple of 16

  explicit Shape(const BatchNorm &n) {
    width = std::max<int64_t>(n.channels, LANES), rows = n.rows * n.channels / width;
  }
};

// The sums over some rows of `vectors` of columns; terms(i, sums) adds two vectors of what lies at x + i.
template <int vectors, class Terms>
inline void add_columns(int64_t first, int64_t rows, int64_t width, double *totals, Terms terms) {
  constexpr int together = 4 / vectors;  // rows, for as many sums at a time as addition takes
  Vec sums[2][together][vectors] = {};
  auto add = [&](int64_t row, int of) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) terms(first + row * width + v * LANES, sums[0][of][v], sums[1][of][v]);
  };
  int64_t row = 0;
  for (; row + together <= rows; row += together)
#pragma GCC unroll 4
    for (int of = 0; of < together; of++) add(row + of, of);
  for (; row < rows; row++) add(row, 0);
  for (int term = 0; term < 2; term++)
    for (int v = 0; v < vectors; v++) {
      Vec sum = {};
      for (int of = 0; of < together; of++) sum += sums[term][of][v];
      for (int lane = 0; lane < LANES; lane++) totals[term * width + v * LANES + lane] += sum[lane];
    }
}

// totals (2 x width) = the sums of two terms over rows.
template <class Terms>
void add_rows(int64_t begin, int64_t end, int64_t width, double *totals, Terms terms) {
  memset(totals, 0, 2 * width * sizeof(double));
  const int64_t most = std::max<int64_t>(IN_L1 / width, 4);
  for (int64_t row = begin; row < end; row += most) {
    const int64_t rows = std::min(most, end - row);
    for (int64_t column = 0; column < width;) {
      const int64_t first = row * width + column, left = (width - column) / LANES;
      if (left >= 4)
        add_columns<4>(first, rows, width, totals + column, terms), column += 4 * LANES;
      else if (left >= 2)
        add_columns<2>(first, rows, width, totals + column, terms), column += 2 * LANES;
      else
        add_columns<1>(first, rows, width, totals + column, terms), column += LANES;
    }
  }
}

// Calls with (channel, both totals of it over all threads).
template <class Use>
void for_channels(const BatchNorm &n, int64_t width, const double *all, int threads, Use use) {
  for (int64_t channel = 0; channel < n.channels; channel++) {
    double totals[2] = {};
    for (int term = 0; term < 2; term++)
      for (int thread = 0; thread < threads; thread++)
        for (int64_t column = channel; column < width; column += n.channels)
          totals[term] += all[(thread * 2 + term) * width + column];
    use(channel, totals[0], totals[1]);
  }
}

void for_columns(const BatchNorm &n, int64_t width, float *to, int64_t channel, float value) {
  for (int64_t column = channel; column < width; column += n.channels) to[column] = value;
}

// y before the ReLU: the same bits forward and backward.
inline Vec normalised(Vec x, Vec mean, Vec factor, Vec bias) { return (x - mean) * factor + bias; }

float rescale(const BatchNorm &n, float variance) { return 1 / std::sqrt(variance + (float)n.epsilon); }

template <bool rectified, class Write>
void normalise(const BatchNorm &n, const float *of_columns, int64_t begin, int64_t end, int64_t width, Write write) {
  for (int64_t row = begin; row < end; row++)
    for (int64_t column = 0; column < width; column += LANES) {
      const float *of = of_columns + column;
      const Vec y = normalised(load(n.x + row * width + column), load(of), load(of + width), load(of + 2 * width));
      write(n.y + row * width + column, rectified ? relu(y) : y);
    }
}

template <bool rectified>
void forward(const BatchNorm &n, int threads) {
  const Shape shape(n);
  const int64_t width = shape.width;
  float *of_columns = shared_kernels.of(3 * width + 4 * width * threads + LANES);
  double *all = (double *)(of_columns + (3 * width + LANES) / LANES * LANES);
  const bool streams = (uintptr_t)n.y % 64 == 0 && shape.rows * width > CACHED;
#pragma omp parallel num_threads(threads)
  {
    const int64_t number = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = shape.rows * thread / number, end = shape.rows * (thread + 1) / number;
    add_rows(begin, end, width, all + 2 * width * thread, [&](int64_t i, Vec &sum, Vec &squares) {
      const Vec x = load(n.x + i);
      sum += x, squares += x * x;
    });
#pragma omp barrier
#pragma omp single
    for_channels(n, width, all, number, [&](int64_t channel, double sum, double squares) {
      const double mean = sum / n.rows;
      n.mean[channel] = mean;
      n.variance[channel] = std::max(squares / n.rows - mean * mean, 0.0);
      for_columns(n, width, of_columns, channel, mean);
      for_columns(n, width, of_columns + width, channel, rescale(n, n.variance[channel]) * n.scale[channel]);
      for_columns(n, width, of_columns + 2 * width, channel, n.bias[channel]);
    });
    if (streams)
      normalise<rectified>(n, of_columns, begin, end, width, [](float *to, Vec v) { stream(to, v); });
    else
      normalise<rectified>(n, of_columns, begin, end, width, [](float *to, Vec v) { store(to, v); });
    after_streams();
  }
}

template <class Grad, class Write>
void spread(const BatchNorm &n, const float *of_columns, int64_t begin, int64_t end, int64_t width, Grad grad, Write write) {
  for (int64_t row = begin; row < end; row++)
    for (int64_t column = 0; column < width; column += LANES) {
      const int64_t i = row * width + column;
      const float *of = of_columns + column;
      const Vec deviation = load(n.x + i) - load(of);
      write(n.x_grad + i, load(of + 3 * width) * (grad(i, column) - load(of + 4 * width) - deviation * load(of + 5 * width)));
    }
}

template <bool rectified>
void backward(const BatchNorm &n, int threads) {
  const Shape shape(n);
  const int64_t width = shape.width;
  float *of_columns = shared_kernels.of(6 * width + 4 * width * threads + LANES);
  double *all = (double *)(of_columns + (6 * width + LANES) / LANES * LANES);
  const bool streams = (uintptr_t)n.x_grad % 64 == 0 && shape.rows * width > CACHED;
  for (int64_t channel = 0; channel < n.channels; channel++) {
    for_columns(n, width, of_columns, channel, n.mean[channel]);
    for_columns(n, width, of_columns + width, channel, rescale(n, n.variance[channel]) * n.scale[channel]);
    for_columns(n, width, of_columns + 2 * width, channel, n.bias[channel]);
  }
  auto grad = [&](int64_t i, int64_t column) {
    const Vec all_of_it = load(n.y_grad + i);
    if (!rectified) return all_of_it;
    const float *of = of_columns + column;
    return normalised(load(n.x + i), load(of), load(of + width), load(of + 2 * width)) > 0 ? all_of_it : Vec{};
  };
#pragma omp parallel num_threads(threads)
  {
    const int64_t number = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t begin = shape.rows * thread / number, end = shape.rows * (thread + 1) / number;
    add_rows(begin, end, width, all + 2 * width * thread, [&](int64_t i, Vec &sum, Vec &products) {
      const int64_t column = i % width;
      const Vec g = grad(i, column);
      sum += g, products += g * (load(n.x + i) - load(of_columns + column));
    });
#pragma omp barrier
#pragma omp single
    for_channels(n, width, all, number, [&](int64_t channel, double sum, double products) {
      const float variance = n.variance[channel], r = rescale(n, variance);
      n.bias_grad[channel] = sum;
      n.scale_grad[channel] = r * products;
      for_columns(n, width, of_columns + 3 * width, channel, r * n.scale[channel]);
      for_columns(n, width, of_columns + 4 * width, channel, sum / n.rows);
      // Rounding made the variance negative, and so zero: then nothing of the deviation is its.
      for_columns(n, width, of_columns + 5 * width, channel, variance > 0 ? r * r * products / n.rows : 0);
    });
    if (streams)
      spread(n, of_columns, begin, end, width, grad, [](float *to, Vec v) { stream(to, v); });
    else
      spread(n, of_columns, begin, end, width, grad, [](float *to, Vec v) { store(to, v); });
    after_streams();
  }
}

}  // namespace

extern "C" {

// y, mean and variance, of x, scale and bias.
int batch_norm_forward(BatchNorm *n) {
  const int threads = n->threads ? n->threads : omp_get_max_threads();
  n->relu ? forward<true>(*n, threads) : forward<false>(*n, threads);
  return 0;
}

// x_grad, scale_grad and bias_grad, of all the others but y.
int batch_norm_backward(BatchNorm *n) {
  const int threads = n->threads ? n->threads : omp_get_max_threads();
  n->relu ? backward<true>(*n, threads) : backward<false>(*n, threads);
  return 0;
}
}
