// Shared by the kernels for AVX-512 with bf16 products: conversions, exp2, and the one matrix product.
#pragma once

#include "kernels.h"

#include <immintrin.h>

namespace rt::avx512_kernels {

inline __m512 load(const bf16* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}
inline __m512 load(const bf16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}
inline void store(bf16* x, __m512 value) { _mm256_storeu_si256((__m256i*)x, (__m256i)_mm512_cvtneps_pbh(value)); }
inline void store(bf16* x, __m512 value, __mmask16 mask) {
  _mm256_mask_storeu_epi16(x, mask, (__m256i)_mm512_cvtneps_pbh(value));
}
inline __mmask16 first(std::size_t lanes) { return __mmask16(lanes >= 16 ? 0xffff : (1u << lanes) - 1); }

// 2^x to 1e-7 relative: x = n + f with f in [-1/2, 1/2], Taylor in f · ln 2. Below -126 the result goes to 0.
inline __m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  for (float coefficient : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(p, n);
}

// The same to 7.5e-5, for what is rounded to bf16 at once; minimax of degree 3.
inline __m512 exp2_coarse(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(5.5171666e-2f);
  for (float coefficient : {2.4261114e-1f, 6.9326099e-1f, 9.9992807e-1f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(p, n);
}

// c (Rows, 16 · Vectors) = a (Rows, 2 · pairs) · b, or c += with Add. b is (pairs, columns, 2): two values that follow
// each other along the sum lie side by side, as VDPBF16PS wants them. Strides in elements of a, pairs of b, floats of c.
template <int Rows, int Vectors, bool Add>
inline void product(std::size_t pairs, const bf16* a, std::size_t a_stride, const bf16* b, std::size_t b_stride,
                    float* c, std::size_t c_stride) {
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Add ? _mm512_loadu_ps(c + i * c_stride + 16 * j) : _mm512_setzero_ps();
  for (std::size_t k = 0; k < pairs; ++k) {
    __m512bh right[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + (k * b_stride + 16 * j) * 2);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      int both;
      __builtin_memcpy(&both, a + i * a_stride + 2 * k, sizeof both);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(c + i * c_stride + 16 * j, sum[i][j]);
}

// Six rows of four vectors fill 24 of 32 registers, enough to hide the latency of the product.
constexpr int kRows = 6;

template <int Vectors, bool Add>
inline void product_rows(int rows, std::size_t pairs, const bf16* a, std::size_t a_stride, const bf16* b,
                         std::size_t b_stride, float* c, std::size_t c_stride) {
  switch (rows) {
    case 1: return product<1, Vectors, Add>(pairs, a, a_stride, b, b_stride, c, c_stride);
    case 2: return product<2, Vectors, Add>(pairs, a, a_stride, b, b_stride, c, c_stride);
    case 3: return product<3, Vectors, Add>(pairs, a, a_stride, b, b_stride, c, c_stride);
    case 4: return product<4, Vectors, Add>(pairs, a, a_stride, b, b_stride, c, c_stride);
    case 5: return product<5, Vectors, Add>(pairs, a, a_stride, b, b_stride, c, c_stride);
    default: return product<6, Vectors, Add>(pairs, a, a_stride, b, b_stride, c, c_stride);
  }
}

// `vectors` ≤ 4 columns of 16, `rows` ≤ 6.
template <bool Add>
inline void product_any(int rows, int vectors, std::size_t pairs, const bf16* a, std::size_t a_stride, const bf16* b,
                        std::size_t b_stride, float* c, std::size_t c_stride) {
  switch (vectors) {
    case 1: return product_rows<1, Add>(rows, pairs, a, a_stride, b, b_stride, c, c_stride);
    case 2: return product_rows<2, Add>(rows, pairs, a, a_stride, b, b_stride, c, c_stride);
    case 3: return product_rows<3, Add>(rows, pairs, a, a_stride, b, b_stride, c, c_stride);
    default: return product_rows<4, Add>(rows, pairs, a, a_stride, b, b_stride, c, c_stride);
  }
}

// A buffer of one thread that keeps its size from call to call.
template <class T>
inline T* scratch(std::vector<T>& buffer, std::size_t size) {
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

void attention(const Attention&, const bf16* q, const bf16* k, const bf16* v, bf16* out);
void group_norm(const GroupNorm&, const bf16* x, const float* scale, const float* shift, bf16* out);
void geglu(std::size_t rows, std::size_t width, const bf16* x, bf16* out);
PackedFilter pack(std::size_t in, std::size_t out, const bf16* weight);
void convolve(const Convolution&, const bf16* x, const PackedFilter&, const float* bias, bf16* out);

}  // namespace rt::avx512_kernels
