// The gradient of max-pooling by windows that do not overlap, in float32, without padding: x is read and its gradient
// written once. It goes to the first maximum of a window, in the order of rows, and beyond the last whole window is zero.

#include "convolution.h"

extern "C" struct Pooling {
  int64_t batch, height, width, channels, size, threads;  // channels: a multiple of 16; threads: 0 for OpenMP's
  float *x, *y_grad, *x_grad;
};

namespace {

typedef int32_t Mask __attribute__((vector_size(LANES * sizeof(int32_t))));

template <int size, class Write>
void windows(const float *x, const float *y_grad, float *x_grad, int64_t columns, int64_t row, int64_t channels, Write write) {
  for (int64_t column = 0; column < columns; column++, y_grad += channels, x += size * channels, x_grad += size * channels)
    for (int64_t channel = 0; channel < channels; channel += LANES) {
      Vec highest = load(x + channel);
      Mask place = {};
#pragma GCC unroll 9
      for (int candidate = 1; candidate < size * size; candidate++) {
        const Vec value = load(x + candidate / size * row + candidate % size * channels + channel);
        const Mask stays = highest >= value;  // so XLA compares them, which among NaNs decides
        highest = stays ? highest : value;
        place = stays ? place : candidate - Mask{};
      }
      const Vec grad = load(y_grad + channel);
#pragma GCC unroll 9
      for (int candidate = 0; candidate < size * size; candidate++)
        write(x_grad + candidate / size * row + candidate % size * channels + channel, place == candidate ? grad : Vec{});
    }
}

template <int size>
void pool_grad(const Pooling &p, int threads) {
  const int64_t row = p.width * p.channels, rows = p.height / size, columns = p.width / size;
  const int64_t rest = (p.width - columns * size) * p.channels;
  const bool streams = (uintptr_t)p.x_grad % 64 == 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t image = 0; image < p.batch; image++) {
      const float *x = p.x + image * p.height * row, *y_grad = p.y_grad + image * rows * columns * p.channels;
      float *x_grad = p.x_grad + image * p.height * row;
      for (int64_t i = 0; i < rows; i++, x += size * row, x_grad += size * row, y_grad += columns * p.channels) {
        if (streams)
          windows<size>(x, y_grad, x_grad, columns, row, p.channels, [](float *to, Vec v) { stream(to, v); });
        else
          windows<size>(x, y_grad, x_grad, columns, row, p.channels, [](float *to, Vec v) { store(to, v); });
        for (int j = 1; j <= size; j++) memset(x_grad + j * row - rest, 0, rest * sizeof(float));
      }
      memset(x_grad, 0, (p.height - rows * size) * row * sizeof(float));
    }
    after_streams();
  }
}

}  // namespace

extern "C" {

// x_grad, of x and y_grad. 1 if there is no code for windows of that size.
int pooling_grad(Pooling *p) {
  const int threads = p->threads ? p->threads : omp_get_max_threads();
  switch (p->size) {
    case 2: pool_grad<2>(*p, threads); return 0;
    case 3: pool_grad<3>(*p, threads); return 0;
    default: return 1;
  }
}
}
