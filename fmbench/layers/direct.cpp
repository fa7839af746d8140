// Convolutions of 3 x 3 in float32 from few channels, with both gradients, by their definition.
//
// Images are NHWC, kernels HWIO, strides 1, the same padding on all sides. Of y and of its gradient, which are the large
// arrays here, all is read or written once; the vectors are 16 outputs of a pixel. Padding is the zeros around a copy of an
// image, made for each thread as it comes to it.

#include "convolution.h"

namespace {

constexpr int PLACES = 9;

struct Shape {
  int64_t height, width, y_height, y_width;  // of an image with its padding, and of its result

  explicit Shape(const Convolution &c) {
    height = c.height + 2 * c.padding, width = c.width + 2 * c.padding;
    y_height = height - 2, y_width = width - 2;
  }
};

// An image with `border` zeros around it: a copy at `copy`, if there are any. `height` and so on are the image's own.
const float *padded(const float *image, int64_t height, int64_t width, int64_t channels, int64_t border, float *copy) {
  if (!border) return image;
  const int64_t row = (width + 2 * border) * channels, side = border * channels;
  memset(copy, 0, border * row * sizeof(float));
  float *to = copy + border * row;
  for (int64_t i = 0; i < height; i++, to += row) {
    memset(to, 0, side * sizeof(float));
    memcpy(to + side, image + i * width * channels, width * channels * sizeof(float));
    memset(to + row - side, 0, side * sizeof(float));
  }
  memset(to, 0, border * row * sizeof(float));
  return copy;
}

// `pixels` of y in a row, 16 * `vectors` outputs of each.
template <int inputs, int pixels, int vectors>
inline void forward(const float *x, int64_t x_row, const float *kernel, const float *bias, bool relu, int64_t outputs,
                    float *y, bool streams) {
  Vec sums[pixels][vectors];
#pragma GCC unroll 2
  for (int v = 0; v < vectors; v++)
#pragma GCC unroll 8
    for (int p = 0; p < pixels; p++) sums[p][v] = bias ? load(bias + v * LANES) : Vec{};
#pragma GCC unroll 3
  for (int i = 0; i < 3; i++)
#pragma GCC unroll 4
    for (int j = 0; j < 3 * inputs; j++) {
      Vec k[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++) k[v] = load(kernel + (i * 3 * inputs + j) * outputs + v * LANES);
#pragma GCC unroll 8
      for (int p = 0; p < pixels; p++) {
        const Vec scalar = x[i * x_row + p * inputs + j] - Vec{};
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sums[p][v] += scalar * k[v];
      }
    }
#pragma GCC unroll 8
  for (int p = 0; p < pixels; p++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
      Vec r = sums[p][v];
      if (relu) r = r > 0 ? r : Vec{};
      float *to = y + p * outputs + v * LANES;
      streams ? stream(to, r) : store(to, r);
    }
}

constexpr int PIXELS = 7;  // at a time; those of a row's last group overlap with the group before

template <int inputs, int vectors>
void forward_row(const float *x, int64_t x_row, const float *kernel, const float *bias, bool relu, int64_t outputs,
                 int64_t width, float *y, bool streams) {
  for (int64_t column = 0; column < width; column += PIXELS) {
    const int64_t at = std::min(column, width - PIXELS);
    forward<inputs, PIXELS, vectors>(x + at * inputs, x_row, kernel, bias, relu, outputs, y + at * outputs, streams);
  }
}

template <int inputs>
void forward_all(const Convolution &c) {
  const Shape shape(c);
  const bool streams = (uintptr_t)c.y % 64 == 0;
#pragma omp parallel num_threads(c.threads)
  {
    float *copy = of_thread.of(shape.height * shape.width * inputs);
#pragma omp for schedule(static)
    for (int64_t image = 0; image < c.batch; image++) {
      const float *x = padded(c.x + image * c.height * c.width * inputs, c.height, c.width, inputs, c.padding, copy);
      float *y = c.y + image * shape.y_height * shape.y_width * c.outputs;
      for (int64_t row = 0; row < shape.y_height; row++, x += shape.width * inputs, y += shape.y_width * c.outputs) {
        int64_t output = 0;
        for (; output + LANES < c.outputs; output += 2 * LANES)
          forward_row<inputs, 2>(x, shape.width * inputs, c.kernel + output, c.bias ? c.bias + output : nullptr, c.relu,
                                 c.outputs, shape.y_width, y + output, streams);
        if (output < c.outputs)
          forward_row<inputs, 1>(x, shape.width * inputs, c.kernel + output, c.bias ? c.bias + output : nullptr, c.relu,
                                 c.outputs, shape.y_width, y + output, streams);
      }
    }
    after_streams();
  }
}

// sum (PLACES x 16 * vectors, inputs * outputs apart) += x^T dy over some rows of an image, of one input.
template <int inputs, int vectors>
void add_rows(const float *x, int64_t x_row, const float *dy, int64_t outputs, int64_t rows, int64_t width, float *sum) {
  Vec sums[PLACES][vectors];
#pragma GCC unroll 9
  for (int place = 0; place < PLACES; place++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) sums[place][v] = load(sum + place * inputs * outputs + v * LANES);
  for (int64_t row = 0; row < rows; row++, x += x_row)
    for (int64_t column = 0; column < width; column++, dy += outputs) {
      Vec d[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; v++) d[v] = load(dy + v * LANES), __builtin_prefetch(dy + 8 * outputs + v * LANES);
#pragma GCC unroll 9
      for (int place = 0; place < PLACES; place++) {
        const Vec scalar = x[place / 3 * x_row + (column + place % 3) * inputs] - Vec{};
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sums[place][v] += scalar * d[v];
      }
    }
#pragma GCC unroll 9
  for (int place = 0; place < PLACES; place++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) store(sum + place * inputs * outputs + v * LANES, sums[place][v]);
}

constexpr int64_t ROWS_IN_L1 = 4;

template <int inputs>
void kernel_grad_all(const Convolution &c) {
  const Shape shape(c);
  const int64_t kernel = PLACES * inputs * c.outputs, of_one = (kernel + c.outputs + LANES) / LANES * LANES;
  float *all = shared_kernels.of(c.threads * of_one);
  int threads = 1;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp single
    threads = omp_get_num_threads();
    float *copy = of_thread.of(shape.height * shape.width * inputs);
    float *sum = all + omp_get_thread_num() * of_one, *bias = sum + kernel;
    memset(sum, 0, of_one * sizeof(float));
#pragma omp for schedule(static)  // so that equal calls have equal bits
    for (int64_t image = 0; image < c.batch; image++) {
      const float *x = padded(c.x + image * c.height * c.width * inputs, c.height, c.width, inputs, c.padding, copy);
      const float *dy = c.y + image * shape.y_height * shape.y_width * c.outputs;
      for (int64_t row = 0; row < shape.y_height; row += ROWS_IN_L1) {
        const int64_t rows = std::min(ROWS_IN_L1, shape.y_height - row);
        const float *x_row = x + row * shape.width * inputs, *dy_row = dy + row * shape.y_width * c.outputs;
        for (int input = 0; input < inputs; input++) {
          int64_t output = 0;
          for (; output + LANES < c.outputs; output += 2 * LANES)
            add_rows<inputs, 2>(x_row + input, shape.width * inputs, dy_row + output, c.outputs, rows, shape.y_width,
                                sum + input * c.outputs + output);
          if (output < c.outputs)
            add_rows<inputs, 1>(x_row + input, shape.width * inputs, dy_row + output, c.outputs, rows, shape.y_width,
                                sum + input * c.outputs + output);
        }
        if (c.bias)
          for (int64_t output = 0; output < c.outputs; output += LANES) {
            Vec of_bias = load(bias + output);
            for (int64_t pixel = 0; pixel < rows * shape.y_width; pixel++)
              of_bias += load(dy_row + pixel * c.outputs + output);
            store(bias + output, of_bias);
          }
      }
    }
#pragma omp for
    for (int64_t i = 0; i < kernel + c.outputs; i++) {
      float total = 0;
      for (int thread = 0; thread < threads; thread++) total += all[thread * of_one + i];
      if (i < kernel)
        c.kernel[i] = total;
      else if (c.bias)
        c.bias[i - kernel] = total;
    }
  }
}

// The sums of 16 vectors, each over its lanes.
inline Vec sums_of(const Vec *v) {
  Vec pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m512 p = (__m512)v[2 * i], q = (__m512)v[2 * i + 1];
    pairs[i] = (Vec)_mm512_unpacklo_ps(p, q) + (Vec)_mm512_unpackhi_ps(p, q);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d p = (__m512d)pairs[2 * i], q = (__m512d)pairs[2 * i + 1];
    fours[i] = (Vec)_mm512_unpacklo_pd(p, q) + (Vec)_mm512_unpackhi_pd(p, q);
  }
  auto halves = [](Vec p, Vec q) {
    const __m512 r = (__m512)p, s = (__m512)q;
    return (Vec)_mm512_shuffle_f32x4(r, s, 0x88) + (Vec)_mm512_shuffle_f32x4(r, s, 0xdd);
  };
  eights[0] = halves(fours[0], fours[1]), eights[1] = halves(fours[2], fours[3]);
  return halves(eights[0], eights[1]);
}

template <int inputs>
void input_grad_all(const Convolution &c) {
  constexpr int pixels = LANES / inputs;  // at a time
  const Shape shape(c);
  const int64_t border = 2 - c.padding, row = (shape.y_width + 2 * border) * c.outputs;
  float *flipped = shared_kernels.of(PLACES * inputs * c.outputs);
  for (int place = 0; place < PLACES; place++)
    memcpy(flipped + place * inputs * c.outputs, c.kernel + (PLACES - 1 - place) * inputs * c.outputs,
           inputs * c.outputs * sizeof(float));
#pragma omp parallel num_threads(c.threads)
  {
    float *copy = of_thread.of((shape.y_height + 2 * border) * row);
#pragma omp for schedule(static)
    for (int64_t image = 0; image < c.batch; image++) {
      const float *dy = padded(c.y + image * shape.y_height * shape.y_width * c.outputs, shape.y_height, shape.y_width,
                               c.outputs, border, copy);
      float *dx = c.x + image * c.height * c.width * inputs;
      for (int64_t i = 0; i < c.height; i++)
        for (int64_t column = 0; column < c.width; column += pixels) {
          const int64_t at = std::min(column, c.width - pixels);
          Vec sums[LANES] = {};
          for (int place = 0; place < PLACES; place++) {
            const float *d = dy + (i + place / 3) * row + (at + place % 3) * c.outputs;
            const float *k = flipped + place * inputs * c.outputs;
            for (int64_t output = 0; output < c.outputs; output += LANES)
#pragma GCC unroll 16
              for (int p = 0; p < pixels; p++) {
                const Vec pixel = load(d + p * c.outputs + output);
#pragma GCC unroll 16
                for (int input = 0; input < inputs; input++)
                  sums[p * inputs + input] += pixel * load(k + input * c.outputs + output);
              }
          }
          store(dx + (i * c.width + at) * inputs, sums_of(sums));
        }
    }
  }
}

// Calls with the number of inputs known to the compiler; 1 if there is no code for it.
template <class Use>
int with_inputs(const Convolution &c, Use use) {
  switch (c.inputs) {
    case 1: use(std::integral_constant<int, 1>()); return 0;
    case 4: use(std::integral_constant<int, 4>()); return 0;
    case 8: use(std::integral_constant<int, 8>()); return 0;
    default: return 1;
  }
}

}  // namespace

extern "C" {

// y = x * kernel + bias (if there is one), and then ReLU (if wanted).
int direct_forward(Convolution *call) {
  const Convolution c = with_threads(*call);
  return with_inputs(c, [&](auto inputs) { forward_all<inputs>(c); });
}

// x = the gradient with respect to it, of y and kernel.
int direct_input_grad(Convolution *call) {
  const Convolution c = with_threads(*call);
  return with_inputs(c, [&](auto inputs) { input_grad_all<inputs>(c); });
}

// kernel, and bias if there is one, = the gradients with respect to them, of x and y.
int direct_kernel_grad(Convolution *call) {
  const Convolution c = with_threads(*call);
  return with_inputs(c, [&](auto inputs) { kernel_grad_all<inputs>(c); });
}
}
