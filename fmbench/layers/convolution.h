// What the layers in C++ share: a call, vectors (the compiler's own) as long as a register, memory.

#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

#ifdef __AVX512F__
constexpr int LANES = 16, REGISTERS = 32;  // floats of a vector, vectors at hand
#else
constexpr int LANES = 8, REGISTERS = 16;
#endif

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

extern "C" struct Convolution {
  int64_t batch, height, width, inputs, outputs, padding, relu, threads;  // threads: 0 for as many as OpenMP has
  float *x, *kernel, *bias, *y;  // of the gradients, what is not given is written
  double seconds[3];             // of the first thread: transforms to the products, products, transforms from them
};

// Says where an array of a call lies.
extern "C" inline __attribute__((used)) int place(float **array, float *where) {
  *array = where;
  return 0;
}

inline Vec load(const float *p) { return *(const Vec *)p; }
inline void store(float *p, Vec v) { *(Vec *)p = v; }

inline Vec relu(Vec v) { return v < 0 ? Vec{} : v; }  // NaN stays NaN

inline void stream(float *p, Vec v) {  // past the caches, which the results need not be in
#ifdef __AVX512F__
  _mm512_stream_ps(p, (__m512)v);
#else
  _mm256_stream_ps(p, (__m256)v);
#endif
}

inline void after_streams() { _mm_sfence(); }

// Memory that is kept from call to call, in large pages where the system has them.
class Workspace {
  float *memory = nullptr;
  size_t size = 0;

 public:
  float *of(size_t floats) {
    if (floats > size) {
      free(memory);
      const size_t page = 2 << 20, bytes = (floats * sizeof(float) + page - 1) / page * page;
      memory = (float *)aligned_alloc(page, bytes);
      if (!memory) abort();
      madvise(memory, bytes, MADV_HUGEPAGE);
      memset(memory, 0, bytes);
      size = floats;
    }
    return memory;
  }
  ~Workspace() { free(memory); }
};

inline Workspace &shared_kernels = *new Workspace;  // never freed: a call may still run while the process ends
inline thread_local Workspace of_thread;

inline Convolution with_threads(Convolution call) {
  if (!call.threads) call.threads = omp_get_max_threads();
  return call;
}
