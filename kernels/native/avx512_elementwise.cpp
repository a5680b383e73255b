// GroupNorm with SiLU, and GEGLU, for AVX-512: one pass over memory for each read and each write.
#include "avx512.h"
#include "parallel.h"

#include <algorithm>
#include <cmath>

namespace rt::avx512_kernels {
namespace {

constexpr std::size_t kPixels = 64;  // summed in fp32; sums of sums are in double

inline __m512 silu(__m512 x) {
  const __m512 decay = exp2(_mm512_mul_ps(x, _mm512_set1_ps(-1.4426950408889634f)));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), decay));
}

// x Φ(x) with erf by Abramowitz and Stegun 7.1.26, 1.5e-7 absolute.
inline __m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(float(M_SQRT1_2)));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  for (float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(coefficient));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t),
                                    exp2(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.4426950408889634f))));
  // Φ(x) is tail / 2 below zero and 1 − tail / 2 above, which loses nothing where Φ is small.
  const __m512 half = _mm512_mul_ps(tail, _mm512_set1_ps(0.5f));
  const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(half, above, one, half));
}

}  // namespace

void group_norm(const GroupNorm& shape, const bf16* x, const float* scale, const float* shift, bf16* out) {
  const std::size_t pixels = shape.pixels, channels = shape.channels, size = channels / shape.groups;
  const std::size_t chunks = (pixels + kPixels - 1) / kPixels;
  std::vector<float> sums(shape.batch * chunks * 2 * channels);
  parallel(shape.batch * chunks, [&](std::size_t item) {
    const std::size_t begin = item % chunks * kPixels, count = std::min(kPixels, pixels - begin);
    const bf16* from = x + (item / chunks * pixels + begin) * channels;
    float* sum = &sums[item * 2 * channels];
    for (std::size_t c = 0; c < channels; c += 16) {
      const __mmask16 mask = first(channels - c);
      __m512 total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
      for (std::size_t p = 0; p < count; ++p) {
        const __m512 value = load(from + p * channels + c, mask);
        total = _mm512_add_ps(total, value);
        squares = _mm512_fmadd_ps(value, value, squares);
      }
      _mm512_mask_storeu_ps(sum + c, mask, total);
      _mm512_mask_storeu_ps(sum + channels + c, mask, squares);
    }
  });
  std::vector<float> factors(shape.batch * channels), offsets(shape.batch * channels);
  for (std::size_t b = 0; b < shape.batch; ++b)
    for (std::size_t group = 0; group < shape.groups; ++group) {
      double total = 0, squares = 0;
      for (std::size_t chunk = 0; chunk < chunks; ++chunk)
        for (std::size_t c = group * size; c < (group + 1) * size; ++c) {
          total += sums[(b * chunks + chunk) * 2 * channels + c];
          squares += sums[((b * chunks + chunk) * 2 + 1) * channels + c];
        }
      const double count = double(pixels * size), mean = total / count;
      const double inverse = 1.0 / std::sqrt(std::max(0.0, squares / count - mean * mean) + double(shape.epsilon));
      for (std::size_t c = group * size; c < (group + 1) * size; ++c) {
        factors[b * channels + c] = float(scale[c] * inverse);
        offsets[b * channels + c] = float(shift[c] - mean * scale[c] * inverse);
      }
    }
  parallel(shape.batch * chunks, [&](std::size_t item) {
    const std::size_t b = item / chunks, begin = item % chunks * kPixels, count = std::min(kPixels, pixels - begin);
    const std::size_t start = (b * pixels + begin) * channels;
    for (std::size_t c = 0; c < channels; c += 16) {
      const __mmask16 mask = first(channels - c);
      const __m512 factor = _mm512_maskz_loadu_ps(mask, &factors[b * channels + c]),
                   offset = _mm512_maskz_loadu_ps(mask, &offsets[b * channels + c]);
      for (std::size_t p = 0; p < count; ++p) {
        const std::size_t at = start + p * channels + c;
        const __m512 y = _mm512_fmadd_ps(load(x + at, mask), factor, offset);
        store(out + at, shape.silu ? silu(y) : y, mask);
      }
    }
  });
}

void geglu(std::size_t rows, std::size_t width, const bf16* x, bf16* out) {
  constexpr std::size_t kGroup = 16;
  parallel((rows + kGroup - 1) / kGroup, [=](std::size_t group) {
    for (std::size_t row = group * kGroup; row < std::min(rows, (group + 1) * kGroup); ++row)
      for (std::size_t c = 0; c < width; c += 16) {
        const __mmask16 mask = first(width - c);
        const bf16* from = x + row * 2 * width + c;
        store(out + row * width + c, _mm512_mul_ps(load(from, mask), gelu(load(from + width, mask))), mask);
      }
  });
}

}  // namespace rt::avx512_kernels

namespace rt {

using namespace avx512_kernels;
const Kernels avx512{"avx512", avx512_kernels::attention, avx512_kernels::group_norm, avx512_kernels::geglu,
                     avx512_kernels::pack, avx512_kernels::convolve};

}  // namespace rt
