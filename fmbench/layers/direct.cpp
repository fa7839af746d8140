// Convolutions of 3 x 3 in float32 from few channels, with both gradients, by their definition.
//
// Images are NHWC, kernels HWIO, strides 1, the same padding on all sides. Of y and of its gradient, which are the large
// arrays here, all is read or written once; a vector has outputs of one pixel, or all 4 or 8
// outputs of several. Padding is the zeros around a copy of an image, made by each thread as it comes to it.

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
const float *padded(const float *image, int64_t height, int64_t width, int64_t channels, int64_t border, float *copy,
                    bool always = false) {
  if (!border && !always) return image;
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

// `pixels` of y in a row, `vectors` of outputs of each.
template <int inputs, int pixels, int vectors>
inline void forward(const float *x, int64_t x_row, const float *kernel, const float *bias, bool rectified, int64_t outputs,
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
      const Vec r = rectified ? relu(sums[p][v]) : sums[p][v];
      float *to = y + p * outputs + v * LANES;
      streams ? stream(to, r) : store(to, r);
    }
}

constexpr int PIXELS = LANES == 16 ? 7 : 6;  // at a time; those of a row's last group overlap with the group before

template <int inputs, int vectors>
void forward_row(const float *x, int64_t x_row, const float *kernel, const float *bias, bool rectified, int64_t outputs,
                 int64_t width, float *y, bool streams) {
  for (int64_t column = 0; column < width; column += PIXELS) {
    const int64_t at = std::min(column, width - PIXELS);
    forward<inputs, PIXELS, vectors>(x + at * inputs, x_row, kernel, bias, rectified, outputs, y + at * outputs, streams);
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

// sum (PLACES x `vectors`, inputs * outputs apart) += x^T dy over some rows of an image, of one input.
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
constexpr int MOST = REGISTERS / 16;  // vectors of outputs at a time, each with a sum for each place

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
          for (; output + (MOST - 1) * LANES < c.outputs; output += MOST * LANES)
            add_rows<inputs, MOST>(x_row + input, shape.width * inputs, dy_row + output, c.outputs, rows, shape.y_width,
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

// The sums of as many vectors as there are lanes, each over its own.
inline Vec sums_of(const Vec *v) {
#ifdef __AVX512F__
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
#else
  auto fours = [](const Vec *v) {  // of each half of four vectors
    const __m256 p = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), q = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    return _mm256_hadd_ps(p, q);
  };
  const __m256 p = fours(v), q = fours(v + 4);
  return (Vec)_mm256_permute2f128_ps(p, q, 0x20) + (Vec)_mm256_permute2f128_ps(p, q, 0x31);
#endif
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

// Few outputs: a vector has those of several pixels.

typedef int32_t Lanes __attribute__((vector_size(LANES * sizeof(int32_t))));

// What all of them have of one input: lane -> pixel * inputs + input.
template <int inputs, int outputs>
inline Lanes lanes_of(int input) {
  Lanes lanes;
  for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane / outputs * inputs + input;
  return lanes;
}

inline Vec permuted(Lanes lanes, Vec v) {
#ifdef __AVX512F__
  return (Vec)_mm512_permutexvar_ps((__m512i)lanes, (__m512)v);
#else
  return __builtin_shuffle(v, lanes);  // lanes are constants, for which the compiler knows better
#endif
}

// The first of `floats`, and zeros where there are fewer than a vector's.
inline Vec load_some(const float *p, int64_t floats) {
#ifdef __AVX512F__
  return (Vec)_mm512_maskz_loadu_ps(floats < LANES ? (1u << floats) - 1 : 0xffff, p);
#else
  const Lanes places = {0, 1, 2, 3, 4, 5, 6, 7};
  return (Vec)_mm256_maskload_ps(p, (__m256i)(places < (int32_t)std::min<int64_t>(floats, LANES)));
#endif
}

// Reads up to a vector beyond the image.
template <int inputs, int outputs, int vectors>
inline void forward_few(const float *x, int64_t x_row, const float *kernel, Vec bias, bool rectified, float *y) {
  constexpr int pixels = LANES / outputs;  // of a vector
  Vec sums[vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; v++) sums[v] = bias;
  for (int place = 0; place < PLACES; place++) {
    const float *from = x + place / 3 * x_row + place % 3 * inputs;
#pragma GCC unroll 8
    for (int input = 0; input < inputs; input++) {
      const Vec k = load(kernel + (place * inputs + input) * LANES);
      const Lanes lanes = lanes_of<inputs, outputs>(input);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sums[v] += permuted(lanes, load(from + v * pixels * inputs)) * k;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; v++) store(y + v * LANES, rectified ? relu(sums[v]) : sums[v]);
}

// y (height x width x outputs) of an image with its padding and of kernels as vectors.
template <int inputs, int outputs>
void image_of_few(const float *x, const float *kernel, Vec bias, bool rectified, int64_t height, int64_t width, float *y) {
  constexpr int pixels = LANES / outputs, vectors = 7;
  const int64_t x_row = (width + 2) * inputs;
  for (int64_t row = 0; row < height; row++, x += x_row, y += width * outputs) {
    int64_t column = 0;
    for (; column + vectors * pixels <= width; column += vectors * pixels)
      forward_few<inputs, outputs, vectors>(x + column * inputs, x_row, kernel, bias, rectified, y + column * outputs);
    for (; column < width; column += pixels) {
      const int64_t at = std::min(column, width - pixels);
      forward_few<inputs, outputs, 1>(x + at * inputs, x_row, kernel, bias, rectified, y + at * outputs);
    }
  }
}

template <int inputs, int outputs>
void forward_all_of_few(const Convolution &c) {
  const Shape shape(c);
  float *kernel = shared_kernels.of(PLACES * inputs * LANES);
  for (int i = 0; i < PLACES * inputs * LANES; i++) kernel[i] = c.kernel[i / LANES * outputs + i % outputs];
  Vec bias = {};
  for (int lane = 0; c.bias && lane < LANES; lane++) bias[lane] = c.bias[lane % outputs];
#pragma omp parallel num_threads(c.threads)
  {
    float *copy = of_thread.of(shape.height * shape.width * inputs + LANES);
#pragma omp for schedule(static)
    for (int64_t image = 0; image < c.batch; image++)
      image_of_few<inputs, outputs>(
          padded(c.x + image * c.height * c.width * inputs, c.height, c.width, inputs, c.padding, copy, true), kernel,
          bias, c.relu, shape.y_height, shape.y_width, c.y + image * shape.y_height * shape.y_width * outputs);
  }
}

// `image_of_few` with one output, whose vectors would need more pixels than a permutation reaches: no training needs it.
template <int inputs>
void image_of_one(const float *x, const float *kernel, int64_t height, int64_t width, float *y) {
  for (int64_t row = 0; row < height; row++)
    for (int64_t column = 0; column < width; column++) {
      float sum = 0;
      for (int place = 0; place < PLACES; place++)
        for (int input = 0; input < inputs; input++)
          sum += x[((row + place / 3) * (width + 2) + column + place % 3) * inputs + input] *
                 kernel[(place * inputs + input) * LANES];
      y[row * width + column] = sum;
    }
}

// The same as forward, of y's gradient and the kernel turned round.
template <int inputs, int outputs>
void input_grad_all_of_few(const Convolution &c) {
  const Shape shape(c);
  const int64_t border = 2 - c.padding;
  float *kernel = shared_kernels.of(PLACES * outputs * LANES);
  for (int i = 0; i < PLACES * outputs * LANES; i++) {
    const int place = PLACES - 1 - i / (outputs * LANES), output = i / LANES % outputs, input = i % inputs;
    kernel[i] = c.kernel[(place * inputs + input) * outputs + output];
  }
#pragma omp parallel num_threads(c.threads)
  {
    float *copy = of_thread.of((shape.y_height + 2 * border) * (shape.y_width + 2 * border) * outputs + LANES);
#pragma omp for schedule(static)
    for (int64_t image = 0; image < c.batch; image++) {
      const float *dy = padded(c.y + image * shape.y_height * shape.y_width * outputs, shape.y_height, shape.y_width,
                               outputs, border, copy, true);
      float *dx = c.x + image * c.height * c.width * inputs;
      if constexpr (inputs == 1)
        image_of_one<outputs>(dy, kernel, c.height, c.width, dx);
      else
        image_of_few<outputs, inputs>(dy, kernel, Vec{}, false, c.height, c.width, dx);
    }
  }
}

// sum (PLACES x inputs vectors) += x^T dy over an image; `places` at a time, as many as there are registers for.
template <int inputs, int outputs, int places>
void add_image_of_few(const float *x, const float *dy, int64_t height, int64_t width, float *sum) {
  constexpr int pixels = LANES / outputs;
  const int64_t x_row = (width + 2) * inputs;
  for (int first = 0; first < PLACES; first += places) {
    Vec sums[places][inputs];
    memcpy(sums, sum + first * inputs * LANES, sizeof sums);
    for (int64_t row = 0; row < height; row++)
      for (int64_t column = 0; column < width; column += pixels) {
        const Vec d = load_some(dy + (row * width + column) * outputs, (width - column) * outputs);
#pragma GCC unroll 9
        for (int p = 0; p < places; p++) {
          const Vec from = load(x + (row + (first + p) / 3) * x_row + (column + (first + p) % 3) * inputs);
#pragma GCC unroll 8
          for (int input = 0; input < inputs; input++)
            sums[p][input] += permuted(lanes_of<inputs, outputs>(input), from) * d;
        }
      }
    memcpy(sum + first * inputs * LANES, sums, sizeof sums);
  }
}

template <int inputs, int outputs>
void kernel_grad_all_of_few(const Convolution &c) {
  const Shape shape(c);
  const int64_t kernel = PLACES * inputs * LANES, of_one = kernel + LANES;
  float *all = shared_kernels.of(c.threads * of_one);
  int threads = 1;
#pragma omp parallel num_threads(c.threads)
  {
#pragma omp single
    threads = omp_get_num_threads();
    float *copy = of_thread.of(shape.height * shape.width * inputs + LANES);
    float *sum = all + omp_get_thread_num() * of_one;
    memset(sum, 0, of_one * sizeof(float));
#pragma omp for schedule(static)  // so that equal calls have equal bits
    for (int64_t image = 0; image < c.batch; image++) {
      const int64_t pixels = shape.y_height * shape.y_width;
      const float *dy = c.y + image * pixels * outputs;
      const float *x = padded(c.x + image * c.height * c.width * inputs, c.height, c.width, inputs, c.padding, copy, true);
      constexpr int places = inputs == 1 ? 9 : 3 * inputs < REGISTERS ? 3 : 1;
      add_image_of_few<inputs, outputs, places>(x, dy, shape.y_height, shape.y_width, sum);
      Vec of_bias = load(sum + kernel);
      for (int64_t i = 0; c.bias && i < pixels * outputs; i += LANES) of_bias += load_some(dy + i, pixels * outputs - i);
      store(sum + kernel, of_bias);
    }
  }
  for (int64_t i = 0; i < PLACES * inputs * outputs; i++) c.kernel[i] = 0;
  for (int64_t i = 0; c.bias && i < outputs; i++) c.bias[i] = 0;
  for (int thread = 0; thread < threads; thread++) {
    const float *sum = all + thread * of_one;
    for (int64_t i = 0; i < kernel; i++) c.kernel[i / LANES * outputs + i % outputs] += sum[i];
    for (int64_t i = 0; c.bias && i < LANES; i++) c.bias[i % outputs] += sum[kernel + i];
  }
}

// Calls of `many` with the inputs and of `few` with inputs and outputs, as the compiler knows them; 1 if there is no code.
template <class Many, class Few>
int with_channels(const Convolution &c, Many many, Few few) {
  std::integral_constant<int, 1> one;
  std::integral_constant<int, 4> four;
  std::integral_constant<int, 8> eight;
  if (c.outputs % LANES == 0) {
    if (c.inputs == 1) return many(one), 0;
    if (c.inputs == 4) return many(four), 0;
    if (c.inputs == 8) return many(eight), 0;
  }
  if (c.inputs == 1 && c.outputs == 4) return few(one, four), 0;
  if (c.inputs == 1 && c.outputs == 8) return few(one, eight), 0;
  if (c.inputs == 4 && c.outputs == 4) return few(four, four), 0;
  if (c.inputs == 8 && c.outputs == 8) return few(eight, eight), 0;
  return 1;
}

}  // namespace

extern "C" {

// y = x * kernel + bias (if there is one), and then ReLU (if wanted).
int direct_forward(Convolution *call) {
  const Convolution c = with_threads(*call);
  return with_channels(
      c, [&](auto inputs) { forward_all<inputs>(c); },
      [&](auto inputs, auto outputs) { forward_all_of_few<inputs, outputs>(c); });
}

// x = the gradient with respect to it, of y and kernel.
int direct_input_grad(Convolution *call) {
  const Convolution c = with_threads(*call);
  return with_channels(
      c, [&](auto inputs) { input_grad_all<inputs>(c); },
      [&](auto inputs, auto outputs) { input_grad_all_of_few<inputs, outputs>(c); });
}

// kernel, and bias if there is one, = the gradients with respect to them, of x and y.
int direct_kernel_grad(Convolution *call) {
  const Convolution c = with_threads(*call);
  return with_channels(
      c, [&](auto inputs) { kernel_grad_all<inputs>(c); },
      [&](auto inputs, auto outputs) { kernel_grad_all_of_few<inputs, outputs>(c); });
}
}
