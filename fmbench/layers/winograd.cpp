// Convolutions of 3 x 3 in float32 by Winograd's F(4x4, 3x3), with both gradients: a quarter of the multiplications.
//
// Images are NHWC, kernels HWIO, strides 1, the same padding on all sides; channels are multiples of 32. An output of
// 4 x 4 pixels (a tile) depends on 6 x 6 pixels of input. With d of these, g of the kernel, in one dimension
//     y = A^T [(G g) * (B^T d)],    and in two    Y = A^T [(G g G^T) * (B^T d B)] A,
// so over the channels it is 36 products of matrices, one for each place of the 6 x 6 (tiles x inputs by inputs x
// outputs). The gradients are transposes of this: of the input G g stays, dy goes through A and the products through B; of the
// kernel, F(3x3, 4x4): x goes through B^T, dy through a G of four columns, and the sum over all tiles through an A of three rows.
//
// A thread takes a block of tiles that stays in its L2 through all 36 products, for two vectors of outputs at a time.
//
// Source: A. Lavin, S. Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; matrices by Toom and Cook for
// the points 0, a, -a, b, -b and infinity.

#include "convolution.h"

namespace {

constexpr int PANEL = 2 * LANES, PLACES = 36;
constexpr int ROWS = 3 * REGISTERS / 8;  // of a product: with its two vectors in each, three quarters of the registers
constexpr int64_t L2_SHARE = 340 << 10;  // bytes of transformed tiles in a block
constexpr int64_t LEAST_TILES = 36;      // in a block, or the kernels come from L3 too often

// With 1 and 2, as they are mostly chosen, errors are five times as large.
constexpr double A = 0.70710678118654752, B = 1.41421356237309505, A2 = A * A, B2 = B * B;
constexpr float a = A, b = B, a2 = A2, b2 = B2, a3 = A2 *A, b3 = B2 *B, ab2 = A *B2, ba2 = B *A2, a2b2 = A2 *B2,
                a2_plus_b2 = A2 + B2;
constexpr float at_0 = 1 / (A2 * B2), at_a = 1 / (2 * A2 * (A2 - B2)), at_b = 1 / (2 * B2 * (B2 - A2));

struct InputTransform {  // B^T
  static constexpr int in = 6, out = 6;
  static inline void apply(const Vec *d, Vec *r) {
    const Vec even_a = d[4] - b2 * d[2], odd_a = d[3] - b2 * d[1];
    const Vec even_b = d[4] - a2 * d[2], odd_b = d[3] - a2 * d[1];
    r[0] = (a2b2 * d[0] + d[4]) - a2_plus_b2 * d[2];
    r[1] = even_a + a * odd_a;
    r[2] = even_a - a * odd_a;
    r[3] = even_b + b * odd_b;
    r[4] = even_b - b * odd_b;
    r[5] = (a2b2 * d[1] + d[5]) - a2_plus_b2 * d[3];
  }
};

struct InputTransposed {  // B
  static constexpr int in = 6, out = 6;
  static inline void apply(const Vec *m, Vec *r) {
    const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    r[0] = a2b2 * m[0];
    r[1] = a2b2 * m[5] - ab2 * difference_a - ba2 * difference_b;
    r[2] = -a2_plus_b2 * m[0] - b2 * sum_a - a2 * sum_b;
    r[3] = a * difference_a + b * difference_b - a2_plus_b2 * m[5];
    r[4] = m[0] + sum_a + sum_b;
    r[5] = m[5];
  }
};

struct OutputTransform {  // A^T
  static constexpr int in = 6, out = 4;
  static inline void apply(const Vec *m, Vec *r) {
    const Vec sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    r[0] = m[0] + sum_a + sum_b;
    r[1] = a * difference_a + b * difference_b;
    r[2] = a2 * sum_a + b2 * sum_b;
    r[3] = a3 * difference_a + b3 * difference_b + m[5];
  }
};

struct OutputTransposed {  // A
  static constexpr int in = 4, out = 6;
  static inline void apply(const Vec *d, Vec *r) {
    const Vec even_a = d[0] + a2 * d[2], odd_a = a * d[1] + a3 * d[3];
    const Vec even_b = d[0] + b2 * d[2], odd_b = b * d[1] + b3 * d[3];
    r[0] = d[0];
    r[1] = even_a + odd_a;
    r[2] = even_a - odd_a;
    r[3] = even_b + odd_b;
    r[4] = even_b - odd_b;
    r[5] = d[3];
  }
};

struct KernelTransform {  // G
  static constexpr int in = 3, out = 6;
  static inline void apply(const Vec *g, Vec *r) {
    const Vec even_a = at_a * (g[0] + a2 * g[2]), odd_a = (at_a * a) * g[1];
    const Vec even_b = at_b * (g[0] + b2 * g[2]), odd_b = (at_b * b) * g[1];
    r[0] = at_0 * g[0];
    r[1] = even_a + odd_a;
    r[2] = even_a - odd_a;
    r[3] = even_b + odd_b;
    r[4] = even_b - odd_b;
    r[5] = g[2];
  }
};

struct OutputAsKernelTransform {  // G of F(3x3, 4x4)
  static constexpr int in = 4, out = 6;
  static inline void apply(const Vec *d, Vec *r) {
    const Vec even_a = at_a * (d[0] + a2 * d[2]), odd_a = at_a * (a * d[1] + a3 * d[3]);
    const Vec even_b = at_b * (d[0] + b2 * d[2]), odd_b = at_b * (b * d[1] + b3 * d[3]);
    r[0] = at_0 * d[0];
    r[1] = even_a + odd_a;
    r[2] = even_a - odd_a;
    r[3] = even_b + odd_b;
    r[4] = even_b - odd_b;
    r[5] = d[3];
  }
};

struct KernelGradTransform {  // A^T of F(3x3, 4x4)
  static constexpr int in = 6, out = 3;
  static inline void apply(const Vec *m, Vec *r) {
    const Vec sum_a = m[1] + m[2], sum_b = m[3] + m[4];
    r[0] = m[0] + sum_a + sum_b;
    r[1] = a * (m[1] - m[2]) + b * (m[3] - m[4]);
    r[2] = a2 * sum_a + b2 * sum_b + m[5];
  }
};

template <class Transform, class Load, class Store>
inline __attribute__((always_inline)) void both_ways(Load load, Store store) {
  Vec half[Transform::in][Transform::out];
#pragma GCC unroll 6
  for (int j = 0; j < Transform::in; j++) {
    Vec d[Transform::in];
#pragma GCC unroll 6
    for (int i = 0; i < Transform::in; i++) d[i] = load(i, j);
    Transform::apply(d, half[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < Transform::out; i++) {
    Vec d[Transform::in], r[Transform::out];
#pragma GCC unroll 6
    for (int j = 0; j < Transform::in; j++) d[j] = half[j][i];
    Transform::apply(d, r);
#pragma GCC unroll 6
    for (int j = 0; j < Transform::out; j++) store(i, j, r[j]);
  }
}

struct Tiling {
  int64_t y_height, y_width, down, across, per_image, all;

  explicit Tiling(const Convolution &c) {
    y_height = c.height + 2 * c.padding - 2, y_width = c.width + 2 * c.padding - 2;
    down = (y_height + 3) / 4, across = (y_width + 3) / 4;
    per_image = down * across, all = c.batch * per_image;
  }
};

struct Tile {
  int64_t image, row, column;  // of the output's first pixel

  Tile(const Tiling &tiling, int64_t i) {
    image = i / tiling.per_image;
    row = i % tiling.per_image / tiling.across * 4, column = i % tiling.across * 4;
  }
};

// Has the lines of a tile to come fetched: they lie apart, and nothing else foresees them.
template <int size>
inline __attribute__((always_inline)) void fetch(const float *image, int64_t width, int64_t channels, int64_t row,
                                                 int64_t column) {
#pragma GCC unroll 6
  for (int i = 0; i < size; i++)
#pragma GCC unroll 6
    for (int j = 0; j < size; j++) __builtin_prefetch(image + ((row + i) * width + column + j) * channels);
}

// Calls with a function of (i, j) -> pixel that gives zeros outside of the image.
template <int size, class Use>
inline __attribute__((always_inline)) void with_pixels(const float *image, int64_t height, int64_t width, int64_t channels,
                                                       int64_t row, int64_t column, Use use) {
  const float *first = image + (row * width + column) * channels;
  if (row >= 0 && column >= 0 && row + size <= height && column + size <= width)
    use([=](int i, int j) { return load(first + (i * width + j) * channels); });
  else
    use([=](int i, int j) {
      const bool inside = row + i >= 0 && row + i < height && column + j >= 0 && column + j < width;
      return inside ? load(first + (i * width + j) * channels) : Vec{};
    });
}

// A multiple of the rows of a product.
int64_t tiles_in_block(int64_t channels) {
  const int64_t fit = L2_SHARE / int64_t(PLACES * sizeof(float) * channels);
  return std::max(fit / ROWS * ROWS, LEAST_TILES);
}

int64_t plane_of(int64_t rows, int64_t columns) { return rows * columns + LANES; }  // an offset against equal cache sets

// m (rows x PANEL) = v (rows x K) u (K x PANEL)
template <int K, int rows>
inline void product(const float *v, const float *u, float *m) {
  Vec sums[rows][2] = {};
  for (int k = 0; k < K; k++) {
    const Vec u0 = load(u + k * PANEL), u1 = load(u + k * PANEL + LANES);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
      const Vec scalar = v[r * K + k] - Vec{};
      sums[r][0] += scalar * u0;
      sums[r][1] += scalar * u1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; r++) store(m + r * PANEL, sums[r][0]), store(m + r * PANEL + LANES, sums[r][1]);
}

template <int K>
void products_of(const float *v, const float *u, float *m, int64_t rows, int64_t v_plane, int64_t m_plane) {
  for (int place = 0; place < PLACES; place++, v += v_plane, u += K * PANEL, m += m_plane) {
    int64_t row = 0;
    for (; row + ROWS / 2 < rows; row += ROWS) product<K, ROWS>(v + row * K, u, m + row * PANEL);
    if (row < rows) product<K, ROWS / 2>(v + row * K, u, m + row * PANEL);
  }
}

using Products = void (*)(const float *, const float *, float *, int64_t, int64_t, int64_t);

Products products_for(int64_t channels) {
  switch (channels) {
    case 32: return products_of<32>;
    case 64: return products_of<64>;
    case 128: return products_of<128>;
    case 256: return products_of<256>;
    case 512: return products_of<512>;
    default: return nullptr;
  }
}

// G g G^T as panels (outputs / PANEL, PLACES, inputs, PANEL), or of the transposed kernel (inputs / PANEL, PLACES,
// outputs, PANEL). Called by all threads.
void transform_kernel(const Convolution &c, float *u, bool transposed) {
  const int64_t rows = transposed ? c.outputs : c.inputs, columns = transposed ? c.inputs : c.outputs;
  const int64_t row_step = transposed ? 1 : c.outputs, step = transposed ? c.outputs : 1;
#pragma omp for collapse(2)
  for (int64_t column = 0; column < columns; column += LANES)
    for (int64_t row = 0; row < rows; row++) {
      const float *first = c.kernel + row * row_step + column * step;
      float *panel = u + (column / PANEL * PLACES * rows + row) * PANEL + column % PANEL;
      Vec g[3][3];
      for (int place = 0; place < 9; place++)
        for (int lane = 0; lane < LANES; lane++)
          g[place / 3][place % 3][lane] = first[place * c.inputs * c.outputs + lane * step];
      // 3 x 3 -> 6 x 6
      both_ways<KernelTransform>([&](int i, int j) { return g[i][j]; },
                                 [&](int i, int j, Vec v) { store(panel + (i * 6 + j) * rows * PANEL, v); });
    }
}

// B^T d B of `tiles` tiles of x from `start` on, as PLACES planes of tiles x inputs.
void transform_x(const Convolution &c, const Tiling &tiling, int64_t start, int64_t tiles, float *v, int64_t v_plane) {
  for (int64_t t = 0; t < tiles; t++) {
    const Tile tile(tiling, start + t), next(tiling, start + t + 1);
    for (int64_t channel = 0; channel < c.inputs; channel += LANES) {
      fetch<6>(c.x + next.image * c.height * c.width * c.inputs + channel, c.width, c.inputs, next.row - c.padding,
               next.column - c.padding);
      with_pixels<6>(c.x + tile.image * c.height * c.width * c.inputs + channel, c.height, c.width, c.inputs,
                     tile.row - c.padding, tile.column - c.padding, [&](auto pixel) {
                       float *to = v + t * c.inputs + channel;
                       both_ways<InputTransform>(
                           pixel, [&](int i, int j, Vec r) { store(to + (i * 6 + j) * v_plane, r); });
                     });
    }
  }
}

constexpr int KERNEL_ROWS = REGISTERS / 4;  // of a product in the kernel's gradient

// sum (KERNEL_ROWS x PANEL) += v^T (tiles x KERNEL_ROWS) z (tiles x PANEL)
inline void add_product(const float *v, int64_t v_row, const float *z, int64_t tiles, float *sum) {
  Vec sums[KERNEL_ROWS][2];
#pragma GCC unroll 16
  for (int r = 0; r < KERNEL_ROWS; r++)
    sums[r][0] = load(sum + r * PANEL), sums[r][1] = load(sum + r * PANEL + LANES);
  for (int64_t t = 0; t < tiles; t++) {
    const Vec z0 = load(z + t * PANEL), z1 = load(z + t * PANEL + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < KERNEL_ROWS; r++) {
      const Vec scalar = v[t * v_row + r] - Vec{};
      sums[r][0] += scalar * z0;
      sums[r][1] += scalar * z1;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < KERNEL_ROWS; r++) store(sum + r * PANEL, sums[r][0]), store(sum + r * PANEL + LANES, sums[r][1]);
}

double now() { return omp_get_wtime(); }

}  // namespace

extern "C" {

// y = x * kernel + bias (if there is one), and then ReLU (if wanted). 1 if there is no code for so many channels.
int winograd_forward(Convolution *call) {
  const Convolution c = with_threads(*call);
  const Tiling tiling(c);
  const Products products = products_for(c.inputs);
  if (!products || c.outputs % PANEL) return 1;
  float *u = shared_kernels.of(PLACES * c.inputs * c.outputs);
  const int64_t block = tiles_in_block(c.inputs), v_plane = plane_of(block, c.inputs), m_plane = plane_of(block, PANEL);
  const bool streams = (uintptr_t)c.y % 64 == 0;
#pragma omp parallel num_threads(c.threads)
  {
    double seconds[3] = {}, then = now();
    auto spent = [&](int on) { const double t = now(); seconds[on] += t - then, then = t; };
    float *v = of_thread.of(PLACES * (v_plane + m_plane)), *m = v + PLACES * v_plane;
    transform_kernel(c, u, false);
    spent(0);
#pragma omp for schedule(dynamic)
    for (int64_t start = 0; start < tiling.all; start += block) {
      const int64_t tiles = std::min(block, tiling.all - start);
      transform_x(c, tiling, start, tiles, v, v_plane);
      spent(0);
      for (int64_t output = 0; output < c.outputs; output += PANEL) {
        products(v, u + output * PLACES * c.inputs, m, tiles, v_plane, m_plane);
        spent(1);
        for (int64_t t = 0; t < tiles; t++) {
          const Tile tile(tiling, start + t);
          const int64_t rows = tiling.y_height - tile.row, columns = tiling.y_width - tile.column;
          for (int64_t channel = 0; channel < PANEL; channel += LANES) {
            const float *from = m + t * PANEL + channel;
            float *to = c.y + ((tile.image * tiling.y_height + tile.row) * tiling.y_width + tile.column) * c.outputs +
                        output + channel;
            const Vec bias = c.bias ? load(c.bias + output + channel) : Vec{};
            both_ways<OutputTransform>([&](int i, int j) { return load(from + (i * 6 + j) * m_plane); },
                                       [&](int i, int j, Vec r) {
                                         if (i >= rows || j >= columns) return;
                                         r += bias;
                                         if (c.relu) r = relu(r);
                                         float *pixel = to + (i * tiling.y_width + j) * c.outputs;
                                         streams ? stream(pixel, r) : store(pixel, r);
                                       });
          }
        }
        spent(2);
      }
    }
    after_streams();
    if (omp_get_thread_num() == 0) memcpy(call->seconds, seconds, sizeof seconds);
  }
  return 0;
}

// x = the gradient with respect to it, of y and kernel.
int winograd_input_grad(Convolution *call) {
  const Convolution c = with_threads(*call);
  const Tiling tiling(c);
  const Products products = products_for(c.outputs);
  if (!products || c.inputs % PANEL) return 1;
  float *u = shared_kernels.of(PLACES * c.inputs * c.outputs);
  // Tiles of x overlap and are summed, so a block is of whole images.
  const int64_t images = std::max<int64_t>(tiles_in_block(c.outputs) / tiling.per_image, 1);
  const int64_t most = (images * tiling.per_image + ROWS - 1) / ROWS * ROWS;
  const int64_t v_plane = plane_of(most, c.outputs), m_plane = plane_of(most, PANEL);
  const int64_t height = tiling.down * 4 + 2, width = tiling.across * 4 + 2;  // of an image with its padding
  const bool streams = (uintptr_t)c.x % 64 == 0;
#pragma omp parallel num_threads(c.threads)
  {
    double seconds[3] = {}, then = now();
    auto spent = [&](int on) { const double t = now(); seconds[on] += t - then, then = t; };
    float *v = of_thread.of(PLACES * (v_plane + m_plane) + height * width * PANEL);
    float *m = v + PLACES * v_plane, *sum = m + PLACES * m_plane;
    transform_kernel(c, u, true);
    spent(0);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < c.batch; first += images) {
      const int64_t count = std::min(images, c.batch - first), tiles = count * tiling.per_image;
      for (int64_t t = 0; t < tiles; t++) {
        const Tile tile(tiling, first * tiling.per_image + t), next(tiling, first * tiling.per_image + t + 1);
        for (int64_t channel = 0; channel < c.outputs; channel += LANES) {
          fetch<4>(c.y + next.image * tiling.y_height * tiling.y_width * c.outputs + channel, tiling.y_width, c.outputs,
                   next.row, next.column);
          with_pixels<4>(c.y + tile.image * tiling.y_height * tiling.y_width * c.outputs + channel, tiling.y_height,
                         tiling.y_width, c.outputs, tile.row, tile.column, [&](auto pixel) {
                           float *to = v + t * c.outputs + channel;
                           both_ways<OutputTransposed>(
                               pixel, [&](int i, int j, Vec r) { store(to + (i * 6 + j) * v_plane, r); });
                         });
        }
      }
      spent(0);
      for (int64_t input = 0; input < c.inputs; input += PANEL) {
        products(v, u + input * PLACES * c.outputs, m, tiles, v_plane, m_plane);
        spent(1);
        for (int64_t image = 0; image < count; image++) {
          memset(sum, 0, height * width * PANEL * sizeof(float));
          for (int64_t t = 0; t < tiling.per_image; t++) {
            const Tile tile(tiling, t);
            for (int64_t channel = 0; channel < PANEL; channel += LANES) {
              const float *from = m + (image * tiling.per_image + t) * PANEL + channel;
              float *to = sum + (tile.row * width + tile.column) * PANEL + channel;
              both_ways<InputTransposed>([&](int i, int j) { return load(from + (i * 6 + j) * m_plane); },
                                         [&](int i, int j, Vec r) {
                                           float *pixel = to + (i * width + j) * PANEL;
                                           store(pixel, load(pixel) + r);
                                         });
            }
          }
          for (int64_t row = 0; row < c.height; row++)
            for (int64_t column = 0; column < c.width; column++) {
              const float *from = sum + ((row + c.padding) * width + column + c.padding) * PANEL;
              float *to = c.x + (((first + image) * c.height + row) * c.width + column) * c.inputs + input;
              for (int64_t channel = 0; channel < PANEL; channel += LANES)
                streams ? stream(to + channel, load(from + channel)) : store(to + channel, load(from + channel));
            }
        }
        spent(2);
      }
    }
    after_streams();
    if (omp_get_thread_num() == 0) memcpy(call->seconds, seconds, sizeof seconds);
  }
  return 0;
}

// kernel, and bias if there is one, = the gradients with respect to them, of x and y.
int winograd_kernel_grad(Convolution *call) {
  const Convolution c = with_threads(*call);
  const Tiling tiling(c);
  if (c.inputs % PANEL || c.outputs % PANEL) return 1;
  const int64_t block = LEAST_TILES, v_plane = plane_of(block, c.inputs), z_plane = plane_of(block, c.outputs);
  const int64_t of_one = PLACES * c.inputs * c.outputs + c.outputs;
  float *sums = shared_kernels.of(c.threads * of_one);
  int threads = 1;
#pragma omp parallel num_threads(c.threads)
  {
    double seconds[3] = {}, then = now();
    auto spent = [&](int on) { const double t = now(); seconds[on] += t - then, then = t; };
#pragma omp single
    threads = omp_get_num_threads();
    float *v = of_thread.of(PLACES * (v_plane + z_plane)), *z = v + PLACES * v_plane;
    float *sum = sums + omp_get_thread_num() * of_one, *bias = sum + of_one - c.outputs;
    memset(sum, 0, of_one * sizeof(float));
#pragma omp for schedule(static)  // so that equal calls have equal bits
    for (int64_t start = 0; start < tiling.all; start += block) {
      const int64_t tiles = std::min(block, tiling.all - start);
      transform_x(c, tiling, start, tiles, v, v_plane);
      for (int64_t t = 0; t < tiles; t++) {
        const Tile tile(tiling, start + t), next(tiling, start + t + 1);
        for (int64_t channel = 0; channel < c.outputs; channel += LANES) {
          fetch<4>(c.y + next.image * tiling.y_height * tiling.y_width * c.outputs + channel, tiling.y_width, c.outputs,
                   next.row, next.column);
          with_pixels<4>(c.y + tile.image * tiling.y_height * tiling.y_width * c.outputs + channel, tiling.y_height,
                         tiling.y_width, c.outputs, tile.row, tile.column, [&](auto pixel) {
                           float *to = z + channel / PANEL * block * PANEL + t * PANEL + channel % PANEL;
                           Vec of_bias = load(bias + channel);
                           both_ways<OutputAsKernelTransform>(
                               [&](int i, int j) {
                                 const Vec d = pixel(i, j);
                                 of_bias += d;
                                 return d;
                               },
                               [&](int i, int j, Vec r) { store(to + (i * 6 + j) * z_plane, r); });
                           store(bias + channel, of_bias);
                         });
        }
      }
      spent(0);
      for (int place = 0; place < PLACES; place++)
        for (int64_t output = 0; output < c.outputs; output += PANEL)
          for (int64_t input = 0; input < c.inputs; input += KERNEL_ROWS)
            add_product(v + place * v_plane + input, c.inputs, z + place * z_plane + output * block, tiles,
                        sum + ((place * c.outputs + output) * c.inputs) + input * PANEL);
      spent(1);
    }
#pragma omp for collapse(2)
    for (int64_t output = 0; output < c.outputs; output += LANES)
      for (int64_t input = 0; input < c.inputs; input++) {
        const float *first = sums + output / PANEL * PANEL * c.inputs + input * PANEL + output % PANEL;
        both_ways<KernelGradTransform>(
            [&](int i, int j) {
              Vec all = {};
              for (int thread = 0; thread < threads; thread++)
                all += load(first + thread * of_one + (i * 6 + j) * c.outputs * c.inputs);
              return all;
            },
            [&](int i, int j, Vec r) { store(c.kernel + ((i * 3 + j) * c.inputs + input) * c.outputs + output, r); });
      }
    if (c.bias) {
#pragma omp single
      for (int64_t output = 0; output < c.outputs; output++) {
        c.bias[output] = 0;
        for (int thread = 0; thread < threads; thread++)
          c.bias[output] += sums[(thread + 1) * of_one - c.outputs + output];
      }
    }
    spent(2);
    if (omp_get_thread_num() == 0) memcpy(call->seconds, seconds, sizeof seconds);
  }
  return 0;
}
}
