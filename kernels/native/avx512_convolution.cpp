// 3 × 3 convolution by Winograd's F(2 × 2, 3 × 3) (Lavin and Gray, https://arxiv.org/abs/1509.09308):
//
//     Y = Aᵀ [ Σ_c (G g Gᵀ) ⊙ (Bᵀ d B) ] A
//
// A tile of 4 × 4 inputs gives 2 × 2 outputs with 16 products a channel instead of 36. The sums over channels are 16
// matrix products, (tiles, in) · (in, out), in bf16 with fp32 sums; both transforms are in fp32.
#include "avx512.h"
#include "parallel.h"

#include <algorithm>

namespace rt::avx512_kernels {
namespace {

constexpr std::size_t kPoints = 16;              // of a transformed tile
constexpr std::size_t kPanel = 64;               // output channels a matrix product
constexpr std::size_t kTiles = 48;               // tiles of one item of work: its sums are 192 KiB
constexpr std::size_t kTransformed = 6u << 20;   // bytes of transformed input at a time, to stay in a shared cache

// Bᵀ d B along one axis: (d0 − d2, d1 + d2, d2 − d1, d1 − d3).
inline void transform(__m512& d0, __m512& d1, __m512& d2, __m512& d3) {
  const __m512 a = _mm512_sub_ps(d0, d2), b = _mm512_add_ps(d1, d2), c = _mm512_sub_ps(d2, d1),
               d = _mm512_sub_ps(d1, d3);
  d0 = a, d1 = b, d2 = c, d3 = d;
}

struct Tiling {
  std::size_t rows, columns, total;
  explicit Tiling(const Convolution& shape)
      : rows((shape.height + 1) / 2), columns((shape.width + 1) / 2), total(shape.batch * rows * columns) {}
};

// One tile to `to` (16, tiles, in), at its place among `tiles`.
void transform_input(const Convolution& shape, const Tiling& tiling, std::size_t tile, const bf16* x, bf16* to,
                     std::size_t tiles) {
  const std::size_t b = tile / (tiling.rows * tiling.columns), i = tile / tiling.columns % tiling.rows * 2,
                    j = tile % tiling.columns * 2;
  const bf16* pixels[kPoints];
  for (std::size_t point = 0; point < kPoints; ++point) {
    const std::size_t y = i + point / 4 - 1, z = j + point % 4 - 1;  // below zero wraps around to far above
    pixels[point] =
        y < shape.height && z < shape.width ? x + ((b * shape.height + y) * shape.width + z) * shape.in : nullptr;
  }
  for (std::size_t c = 0; c < shape.in; c += 32) {
    __m512 d[2][4][4];
    for (std::size_t half = 0; half < 2; ++half) {
      for (std::size_t point = 0; point < kPoints; ++point)
        d[half][point / 4][point % 4] =
            pixels[point] ? load(pixels[point] + c + 16 * half) : _mm512_setzero_ps();
      for (auto& row : d[half]) transform(row[0], row[1], row[2], row[3]);
      for (int k = 0; k < 4; ++k) transform(d[half][0][k], d[half][1][k], d[half][2][k], d[half][3][k]);
    }
    for (std::size_t point = 0; point < kPoints; ++point)
      _mm512_storeu_si512(to + point * tiles * shape.in + c,
                          (__m512i)_mm512_cvtne2ps_pbh(d[1][point / 4][point % 4], d[0][point / 4][point % 4]));
  }
}

// Aᵀ m A + bias for 16 channels of one tile: (m0 + m1 + m2, m1 − m2 − m3) along each axis.
void transform_output(const Convolution& shape, const Tiling& tiling, std::size_t tile, const float* sums,
                      std::size_t stride, __m512 bias, std::size_t channel, bf16* out) {
  const std::size_t b = tile / (tiling.rows * tiling.columns), i = tile / tiling.columns % tiling.rows * 2,
                    j = tile % tiling.columns * 2;
  __m512 half[2][4];
  for (int k = 0; k < 4; ++k) {
    const __m512 m0 = _mm512_loadu_ps(sums + k * stride), m1 = _mm512_loadu_ps(sums + (4 + k) * stride),
                 m2 = _mm512_loadu_ps(sums + (8 + k) * stride), m3 = _mm512_loadu_ps(sums + (12 + k) * stride);
    half[0][k] = _mm512_add_ps(_mm512_add_ps(m0, m1), m2);
    half[1][k] = _mm512_sub_ps(_mm512_sub_ps(m1, m2), m3);
  }
  for (std::size_t y = 0; y < 2 && i + y < shape.height; ++y) {
    const __m512* m = half[y];
    bf16* to = out + ((b * shape.height + i + y) * shape.width + j) * shape.out + channel;
    store(to, _mm512_add_ps(_mm512_add_ps(_mm512_add_ps(m[0], m[1]), m[2]), bias));
    if (j + 1 < shape.width)
      store(to + shape.out, _mm512_add_ps(_mm512_sub_ps(_mm512_sub_ps(m[1], m[2]), m[3]), bias));
  }
}

std::size_t panels(std::size_t out) { return (out + kPanel - 1) / kPanel; }

}  // namespace

// G g Gᵀ as (panel, 16, in / 2, 64, 2): all that one panel of output channels reads lies together.
PackedFilter pack(std::size_t in, std::size_t out, const bf16* weight) {
  PackedFilter filter;
  filter.half.resize(panels(out) * kPanel * kPoints * in);
  parallel(out, [&](std::size_t o) {
    for (std::size_t i = 0; i < in; ++i) {
      float g[3][3], half[4][3];
      for (int tap = 0; tap < 9; ++tap) g[tap / 3][tap % 3] = to_float(weight[(o * in + i) * 9 + tap]);
      for (int k = 0; k < 3; ++k) {
        half[0][k] = g[0][k], half[3][k] = g[2][k];
        half[1][k] = 0.5f * (g[0][k] + g[1][k] + g[2][k]), half[2][k] = 0.5f * (g[0][k] - g[1][k] + g[2][k]);
      }
      for (std::size_t y = 0; y < 4; ++y) {
        const float* h = half[y];
        const float row[4] = {h[0], 0.5f * (h[0] + h[1] + h[2]), 0.5f * (h[0] - h[1] + h[2]), h[2]};
        for (std::size_t z = 0; z < 4; ++z)
          filter.half[((((o / kPanel) * kPoints + 4 * y + z) * in + i / 2 * 2) * kPanel) + o % kPanel * 2 + i % 2] =
              to_bf16(row[z]);
      }
    }
  });
  return filter;
}

void convolve(const Convolution& shape, const bf16* x, const PackedFilter& filter, const float* bias, bf16* out) {
  const Tiling tiling(shape);
  const std::size_t in = shape.in;
  const std::size_t most = std::max(kTiles, kTransformed / (kPoints * in * sizeof(bf16)) / kTiles * kTiles);
  static thread_local std::vector<bf16> buffer;
  for (std::size_t begin = 0; begin < tiling.total; begin += most) {
    const std::size_t tiles = std::min(most, tiling.total - begin);
    bf16* transformed = scratch(buffer, kPoints * tiles * in);
    parallel((tiles + 7) / 8, [&](std::size_t group) {
      for (std::size_t tile = 8 * group; tile < std::min(tiles, 8 * group + 8); ++tile)
        transform_input(shape, tiling, begin + tile, x, transformed + tile * in, tiles);
    });
    const std::size_t blocks = (tiles + kTiles - 1) / kTiles;
    parallel(panels(shape.out) * blocks, [&](std::size_t item) {
      static thread_local std::vector<float> sum_buffer;
      float* sums = scratch(sum_buffer, kPoints * kTiles * kPanel);
      const std::size_t panel = item / blocks, start = item % blocks * kTiles, count = std::min(kTiles, tiles - start);
      const int vectors = int(std::min(kPanel, shape.out - panel * kPanel) / 16);
      for (std::size_t point = 0; point < kPoints; ++point) {
        const bf16* weights = filter.half.data() + (panel * kPoints + point) * in * kPanel;
        for (std::size_t tile = 0; tile < count; tile += kRows)
          product_any<false>(int(std::min<std::size_t>(kRows, count - tile)), vectors, in / 2,
                             transformed + (point * tiles + start + tile) * in, in, weights, kPanel,
                             sums + (point * kTiles + tile) * kPanel, kPanel);
      }
      for (int vector = 0; vector < vectors; ++vector) {
        const std::size_t channel = panel * kPanel + 16 * std::size_t(vector);
        const __m512 offset = _mm512_loadu_ps(bias + channel);
        for (std::size_t tile = 0; tile < count; ++tile)
          transform_output(shape, tiling, begin + start + tile, sums + tile * kPanel + 16 * vector, kTiles * kPanel,
                           offset, channel, out);
      }
    });
  }
}

}  // namespace rt::avx512_kernels
