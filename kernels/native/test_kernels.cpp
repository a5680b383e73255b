// Every instruction set of this processor against plain arithmetic in double, on fresh random inputs.
#include "kernels.h"

#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>

namespace {

using rt::bf16;

std::mt19937 generator{std::random_device{}()};

std::vector<bf16> random(std::size_t count, float scale = 1.0f, float mean = 0.0f) {
  std::normal_distribution<float> normal(mean, scale);
  std::vector<bf16> values(count);
  for (bf16& value : values) value = rt::to_bf16(normal(generator));
  return values;
}

std::vector<float> widened(const std::vector<bf16>& values) {
  std::vector<float> wide;
  for (bf16 value : values) wide.push_back(rt::to_float(value));
  return wide;
}

std::vector<bf16> poison(std::size_t count) { return std::vector<bf16>(count, rt::to_bf16(NAN)); }

// Relative L2 distance; NaN when an output was left alone.
double distance(const std::vector<bf16>& got, const std::vector<double>& expected) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    error += std::pow(rt::to_float(got[i]) - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

int failures = 0;

// bf16 rounds by 2⁻⁸ at most, by 1.7e-3 in the mean square; `limit` is on the mean square, of the output and of what is
// rounded inside, so that cases need some hundred elements.
void check(const std::string& what, double error, double limit) {
  const bool good = error <= limit;
  std::printf("%-4s %-60s %.2e of %.1e\n", good ? "ok" : "FAIL", what.c_str(), error, limit);
  failures += !good;
}

void attention(const rt::Kernels& set, const rt::Attention& s) {
  const std::size_t row = s.heads * s.width;
  const auto q = random(s.batch * s.queries * row, 2), k = random(s.batch * s.keys * row),
             v = random(s.batch * s.keys * row);
  std::vector<double> expected(q.size());
  std::vector<double> weights(s.keys);
  for (std::size_t b = 0; b < s.batch; ++b)
    for (std::size_t head = 0; head < s.heads; ++head)
      for (std::size_t i = 0; i < s.queries; ++i) {
        double most = -INFINITY, total = 0;
        for (std::size_t j = 0; j < s.keys; ++j) {
          double dot = 0;
          for (std::size_t c = head * s.width; c < (head + 1) * s.width; ++c)
            dot += double(rt::to_float(q[(b * s.queries + i) * row + c])) * rt::to_float(k[(b * s.keys + j) * row + c]);
          weights[j] = dot / std::sqrt(double(s.width));
          most = std::max(most, weights[j]);
        }
        for (double& weight : weights) total += weight = std::exp(weight - most);
        for (std::size_t c = head * s.width; c < (head + 1) * s.width; ++c) {
          double sum = 0;
          for (std::size_t j = 0; j < s.keys; ++j) sum += weights[j] * rt::to_float(v[(b * s.keys + j) * row + c]);
          expected[(b * s.queries + i) * row + c] = sum / total;
        }
      }
  auto out = poison(q.size());
  set.attention(s, q.data(), k.data(), v.data(), out.data());
  check(std::string(set.name) + " attention " + std::to_string(s.queries) + " x " + std::to_string(s.keys) + ", " +
            std::to_string(s.heads) + " heads of " + std::to_string(s.width),
        distance(out, expected), 4e-3);
}

void group_norm(const rt::Kernels& set, const rt::GroupNorm& s, float mean) {
  const auto x = random(s.batch * s.pixels * s.channels, 1, mean);
  const auto scale = widened(random(s.channels)), shift = widened(random(s.channels));
  std::vector<double> expected(x.size());
  const std::size_t size = s.channels / s.groups;
  for (std::size_t b = 0; b < s.batch; ++b)
    for (std::size_t group = 0; group < s.groups; ++group) {
      const auto each = [&](const std::function<void(std::size_t, std::size_t)>& body) {
        for (std::size_t p = 0; p < s.pixels; ++p)
          for (std::size_t c = group * size; c < (group + 1) * size; ++c)
            body((b * s.pixels + p) * s.channels + c, c);
      };
      double sum = 0, squares = 0;
      each([&](std::size_t at, std::size_t) { sum += rt::to_float(x[at]); });
      const double center = sum / double(s.pixels * size);
      each([&](std::size_t at, std::size_t) { squares += std::pow(rt::to_float(x[at]) - center, 2); });
      const double deviation = std::sqrt(squares / double(s.pixels * size) + double(s.epsilon));
      each([&](std::size_t at, std::size_t c) {
        const double y = (rt::to_float(x[at]) - center) / deviation * double(scale[c]) + double(shift[c]);
        expected[at] = s.silu ? y / (1 + std::exp(-y)) : y;
      });
    }
  auto out = poison(x.size());
  set.group_norm(s, x.data(), scale.data(), shift.data(), out.data());
  check(std::string(set.name) + " group norm " + std::to_string(s.pixels) + " x " + std::to_string(s.channels) +
            " in " + std::to_string(s.groups) + (s.silu ? ", silu" : "") + ", mean " + std::to_string(int(mean)),
        distance(out, expected), 2.5e-3);
}

void geglu(const rt::Kernels& set, std::size_t rows, std::size_t width) {
  const auto x = random(rows * width * 2, 2);
  std::vector<double> expected(rows * width);
  for (std::size_t row = 0; row < rows; ++row)
    for (std::size_t c = 0; c < width; ++c) {
      const double value = rt::to_float(x[row * 2 * width + c]), gate = rt::to_float(x[(row * 2 + 1) * width + c]);
      expected[row * width + c] = value * gate * 0.5 * std::erfc(-gate * M_SQRT1_2);
    }
  auto out = poison(rows * width);
  set.geglu(rows, width, x.data(), out.data());
  check(std::string(set.name) + " geglu " + std::to_string(rows) + " x " + std::to_string(width),
        distance(out, expected), 2.5e-3);
}

void convolve(const rt::Kernels& set, const rt::Convolution& s) {
  const auto x = random(s.batch * s.height * s.width * s.in), weight = random(s.out * s.in * 9, 0.1f);
  const auto bias = widened(random(s.out));
  std::vector<double> expected(s.batch * s.height * s.width * s.out);
  for (std::size_t b = 0; b < s.batch; ++b)
    for (std::size_t i = 0; i < s.height; ++i)
      for (std::size_t j = 0; j < s.width; ++j)
        for (std::size_t o = 0; o < s.out; ++o) {
          double sum = double(bias[o]);
          for (std::size_t tap = 0; tap < 9; ++tap) {
            const std::size_t y = i + tap / 3 - 1, z = j + tap % 3 - 1;
            if (y >= s.height || z >= s.width) continue;
            for (std::size_t c = 0; c < s.in; ++c)
              sum += double(rt::to_float(x[((b * s.height + y) * s.width + z) * s.in + c])) *
                     rt::to_float(weight[(o * s.in + c) * 9 + tap]);
          }
          expected[((b * s.height + i) * s.width + j) * s.out + o] = sum;
        }
  auto out = poison(expected.size());
  set.convolve(s, x.data(), set.pack(s.in, s.out, weight.data()), bias.data(), out.data());
  check(std::string(set.name) + " convolution " + std::to_string(s.height) + " x " + std::to_string(s.width) + ", " +
            std::to_string(s.in) + " to " + std::to_string(s.out),
        distance(out, expected), 6e-3);
}

}  // namespace

int main() {
  for (const rt::Kernels* set : rt::available()) {
    for (std::size_t width : {40, 64, 80, 128, 160}) {
      attention(*set, {2, 100, 100, 2, width});
      attention(*set, {2, 100, 77, 2, width});
    }
    attention(*set, {1, 300, 600, 1, 40});
    attention(*set, {1, 1, 1, 1, 8});
    attention(*set, {1, 13, 65, 3, 5});
    attention(*set, {1, 70, 70, 1, 512});
    for (bool silu : {false, true})
      for (std::size_t channels : {64, 320, 960}) {
        group_norm(*set, {2, 65, channels, 32, 1e-5f, silu}, 0);
        group_norm(*set, {1, 300, channels, 32, 1e-6f, silu}, 10);
      }
    group_norm(*set, {1, 16, 24, 4, 1e-5f, true}, 0);
    geglu(*set, 33, 1280);
    geglu(*set, 37, 20);
    convolve(*set, {2, 8, 8, 64, 64});
    convolve(*set, {1, 7, 9, 32, 48});
    convolve(*set, {1, 1, 1, 32, 16});
    convolve(*set, {1, 52, 52, 320, 16});  // more tiles than one block
    convolve(*set, {2, 16, 16, 320, 80});
  }
  return failures != 0;
}
