// GroupNorm with SiLU on a GPU, with rt's kernel and without Python, held to plain arithmetic on the host.
#include <rt_ops.h>

#include <cmath>
#include <cstdio>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(rt_status status) {
  if (status == RT_OK) return;
  const int code = rt_driver_error();
  throw std::runtime_error(rt_status_string(status) + (code ? " (CUDA error " + std::to_string(code) + ")" : ""));
}

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// The kernels of this process.
class Kernels {
 public:
  Kernels() { check(rt_kernels_open(nullptr, &handle_)); }
  ~Kernels() { rt_kernels_close(handle_); }
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;
  operator rt_kernels*() const { return handle_; }

 private:
  rt_kernels* handle_ = nullptr;
};

// An array on the device.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : bytes_(count * sizeof(T)) { check(cudaMalloc(&data_, bytes_)); }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    check(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  std::vector<T> read() const {
    std::vector<T> values(bytes_ / sizeof(T));
    check(cudaMemcpy(values.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return values;
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

constexpr std::size_t kBatch = 2, kPixels = 64 * 64, kChannels = 320, kGroups = 32;
constexpr double kEps = 1e-5;

std::vector<float> reference(const std::vector<__half>& x, const std::vector<float>& scale,
                             const std::vector<float>& shift) {
  constexpr std::size_t width = kChannels / kGroups;
  std::vector<float> y(x.size());
  for (std::size_t row = 0; row < kBatch; ++row)
    for (std::size_t group = 0; group < kGroups; ++group) {
      const auto each = [&](auto body) {
        for (std::size_t pixel = 0; pixel < kPixels; ++pixel)
          for (std::size_t c = group * width; c < (group + 1) * width; ++c)
            body((row * kPixels + pixel) * kChannels + c, c);
      };
      double sum = 0, squares = 0;
      each([&](std::size_t at, std::size_t) { sum += double(__half2float(x[at])); });
      const double mean = sum / double(kPixels * width);
      each([&](std::size_t at, std::size_t) { squares += std::pow(double(__half2float(x[at])) - mean, 2); });
      const double deviation = std::sqrt(squares / double(kPixels * width) + kEps);
      each([&](std::size_t at, std::size_t c) {
        const double h = (double(__half2float(x[at])) - mean) / deviation * double(scale[c]) + double(shift[c]);
        y[at] = float(h / (1 + std::exp(-h)));
      });
    }
  return y;
}

void run() {
  const Kernels kernels;
  check(cudaFree(nullptr));  // makes the primary context current, which the kernels then use
  int capability = 0;
  check(rt_kernels_capability(kernels, &capability));
  std::printf("compute capability %d.%d, %zu images\n", capability / 10, capability % 10, rt_kernel_count());

  std::mt19937 generator(7);
  std::normal_distribution<float> normal(1, 1);
  std::vector<__half> x(kBatch * kPixels * kChannels);
  std::vector<float> scale(kChannels), shift(kChannels);
  for (__half& value : x) value = __float2half(normal(generator));
  for (float& value : scale) value = normal(generator);
  for (float& value : shift) value = normal(generator);

  const Buffer<__half> device_x(x), device_y(x.size());
  const Buffer<float> device_bias(std::vector<float>(kBatch * kChannels)), device_scale(scale), device_shift(shift);
  check(rt_group_norm(kernels, RT_FLOAT16, kBatch, kPixels, kChannels, kGroups, kEps, true, device_x.data(),
                      device_bias.data(), device_scale.data(), device_shift.data(), device_y.data(), nullptr));
  check(cudaDeviceSynchronize());

  const std::vector<float> expected = reference(x, scale, shift);
  const std::vector<__half> y = device_y.read();
  float error = 0, largest = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    error = std::fmax(error, std::fabs(__half2float(y[i]) - expected[i]));
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  std::printf("largest difference from the host %.1e of %.1f\n", double(error), double(largest));
  if (!(error <= 2e-3f * largest)) throw std::runtime_error("GPU and host disagree");
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "error: %s\n", problem.what());
    return 1;
  }
}
