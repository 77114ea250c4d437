// Batch normalisation with the activation that follows it: statistics, forward and backward, a pass each.
//
// The statistics come apart from their use, so that those of other workers can be added in between.

#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.h"

namespace {

using namespace iaml;

constexpr int64_t VECTOR = 64;  // channels that fill a few vectors

// The same values as if several pixels side by side were one with more channels, enough of them for long vectors.
struct Wide {
  Shape shape;
  int64_t channels;  // that there are in truth

  explicit Wide(const Shape& narrow) : shape(narrow), channels(narrow.channels) {
    while (shape.channels < VECTOR && shape.width % 2 == 0) shape.channels *= 2, shape.width /= 2;
  }

  // what is given by channel, for each channel of the wide pixels
  std::vector<float> tile(const float* values) const {
    std::vector<float> tiled(shape.channels);
    for (int64_t c = 0; c < shape.channels; c++) tiled[c] = values[c % channels];
    return tiled;
  }
};

// what a layer does to its input, by channel: leaky((x - mean) / sqrt(var + eps) weight + bias); `slope` is that below 0
struct Layer {
  const float *mean, *var, *weight, *bias;
  float eps, slope;

  float inverse_std(int64_t channel) const { return 1.f / std::sqrt(var[channel] + eps); }
};

// the same as leaky(x scale + shift)
struct Affine {
  std::vector<float> scale, shift;

  Affine(const Layer& layer, const Wide& wide) : scale(wide.channels), shift(wide.channels) {
    for (int64_t c = 0; c < wide.channels; c++) {
      scale[c] = layer.weight[c] * layer.inverse_std(c);
      shift[c] = layer.bias[c] - layer.mean[c] * scale[c];
    }
    scale = wide.tile(scale.data()), shift = wide.tile(shift.data());
  }
};

// by channel, the sums of two values over all pixels: body(a pixel's first value, sums, sums) adds those of a pixel
template <typename Body>
void sum_pairs(const Wide& wide, double* first_sums, double* second_sums, const Body& body) {
  const int64_t channels = wide.shape.channels, blocks = wide.shape.blocks(), pixels = wide.shape.pixels();
  std::vector<float> parts(wide.shape.images * blocks * 2 * channels);
  for_blocks(wide.shape, [&](int64_t image, int64_t block, int64_t first, int64_t last) {
    float* sums = parts.data() + (image * blocks + block) * 2 * channels;
    for (int64_t pixel = image * pixels + first; pixel < image * pixels + last; pixel++)
      body(pixel * channels, sums, sums + channels);
  });
  for (int64_t part = 0; part < wide.shape.images * blocks; part++)
    for (int64_t c = 0; c < channels; c++) {
      first_sums[c % wide.channels] += parts[part * 2 * channels + c];
      second_sums[c % wide.channels] += parts[(part * 2 + 1) * channels + c];
    }
}

// body(a pixel's first value) for all pixels
template <typename Body>
void for_pixels(const Shape& shape, const Body& body) {
  const int64_t channels = shape.channels, pixels = shape.pixels();
  for_blocks(shape, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    for (int64_t pixel = image * pixels + first; pixel < image * pixels + last; pixel++) body(pixel * channels);
  });
}

}  // namespace

// mean and population variance of each channel
extern "C" void moments(const Shape& shape, const void* x, float* mean, float* var) {
  const double count = static_cast<double>(shape.images) * shape.pixels();
  const Wide wide(shape);
  std::vector<double> sums(shape.channels), squares(shape.channels);
  std::vector<float> origin(shape.channels);  // a value of each channel: squares of differences to it lose no digits
  with_type(
      shape,
      [&](const auto* values) {
        std::copy_n(values, shape.channels, origin.data());
        const auto origins = wide.tile(origin.data());
        sum_pairs(wide, sums.data(), squares.data(), [&](int64_t place, float* of_values, float* of_squares) {
          const int64_t channels = wide.shape.channels;
          const auto* __restrict__ in = values + place;
          const float* __restrict__ centre = origins.data();
          float *__restrict__ sum = of_values, *__restrict__ square = of_squares;
          for (int64_t c = 0; c < channels; c++) {
            const float difference = static_cast<float>(in[c]) - centre[c];
            sum[c] += difference;
            square[c] += difference * difference;
          }
        });
      },
      const_cast<void*>(x));
  for (int64_t c = 0; c < shape.channels; c++) {
    const double shift = sums[c] / count, variance = squares[c] / count - shift * shift;
    mean[c] = origin[c] + shift;
    var[c] = variance < 0 ? 0 : variance;  // which leaves NaN as it is
  }
}

// y = what the layer makes of x
extern "C" void normalise(const Shape& shape, const void* x, const float* mean, const float* var, const float* weight,
                          const float* bias, float eps, float slope, void* y) {
  const Wide wide(shape);
  const Affine affine({mean, var, weight, bias, eps, slope}, wide);
  with_type(
      shape,
      [&](const auto* values, auto* result) {
        for_pixels(wide.shape, [&](int64_t place) {
          const auto* __restrict__ in = values + place;
          auto* __restrict__ out = result + place;
          const float *__restrict__ scales = affine.scale.data(), *__restrict__ shifts = affine.shift.data();
          const float below = slope;
          const int64_t channels = wide.shape.channels;
          for (int64_t c = 0; c < channels; c++) {
            const float value = static_cast<float>(in[c]) * scales[c] + shifts[c];
            out[c] = value * (value > 0 ? 1.f : below);
          }
        });
      },
      const_cast<void*>(x), y);
}

// sums of g, which is the gradient before the activation, and of g (x - mean) / sqrt(var + eps), one after the other:
// the gradients of bias and weight
extern "C" void normalise_sums(const Shape& shape, const void* grad, const void* x, const float* mean, const float* var,
                               const float* weight, const float* bias, float eps, float slope, float* sums) {
  const Wide wide(shape);
  const Layer layer{mean, var, weight, bias, eps, slope};
  const Affine affine(layer, wide);
  const auto tiled_mean = wide.tile(mean);
  std::vector<double> of_grad(shape.channels), of_product(shape.channels);
  with_type(
      shape,
      [&](const auto* gradients, const auto* values) {
        sum_pairs(wide, of_grad.data(), of_product.data(), [&](int64_t place, float* of_pixel, float* with_value) {
          const auto *__restrict__ in = values + place, *__restrict__ gy = gradients + place;
          const float *__restrict__ scales = affine.scale.data(), *__restrict__ shifts = affine.shift.data();
          const float* __restrict__ means = tiled_mean.data();
          const float below = slope;
          const int64_t channels = wide.shape.channels;
          float *__restrict__ sum = of_pixel, *__restrict__ product = with_value;
          for (int64_t c = 0; c < channels; c++) {
            const float value = in[c], activated = value * scales[c] + shifts[c];
            const float gradient = static_cast<float>(gy[c]) * (activated > 0 ? 1.f : below);
            sum[c] += gradient;
            product[c] += gradient * (value - means[c]);
          }
        });
      },
      const_cast<void*>(grad), const_cast<void*>(x));
  for (int64_t c = 0; c < shape.channels; c++) {
    sums[c] = of_grad[c];
    sums[shape.channels + c] = of_product[c] * layer.inverse_std(c);
  }
}

// gradient of x, through the statistics as well, which are those of `count` values: what g, see above, and its sums
// over all of them make of it
extern "C" void normalise_backward(const Shape& shape, const void* grad, const void* x, const float* mean,
                                   const float* var, const float* weight, const float* bias, float eps, float slope,
                                   const float* sums, int64_t count, void* grad_x) {
  const Wide wide(shape);
  const Layer layer{mean, var, weight, bias, eps, slope};
  const Affine affine(layer, wide);
  std::vector<float> constant(shape.channels), by_value(shape.channels);  // (g - constant - (x - mean) by_value) scale
  for (int64_t c = 0; c < shape.channels; c++) {
    constant[c] = sums[c] / count;
    by_value[c] = sums[shape.channels + c] / count * layer.inverse_std(c);
  }
  const auto tiled_mean = wide.tile(mean), tiled_constant = wide.tile(constant.data());
  const auto tiled_factor = wide.tile(by_value.data());
  with_type(
      shape,
      [&](const auto* gradients, const auto* values, auto* result) {
        for_pixels(wide.shape, [&](int64_t place) {
          const auto *__restrict__ in = values + place, *__restrict__ gy = gradients + place;
          const float *__restrict__ scales = affine.scale.data(), *__restrict__ shifts = affine.shift.data();
          const float *__restrict__ means = tiled_mean.data(), *__restrict__ constants = tiled_constant.data();
          const float* __restrict__ by_values = tiled_factor.data();
          const float below = slope;
          const int64_t channels = wide.shape.channels;
          auto* __restrict__ out = result + place;
          for (int64_t c = 0; c < channels; c++) {
            const float value = in[c], activated = value * scales[c] + shifts[c];
            const float gradient = static_cast<float>(gy[c]) * (activated > 0 ? 1.f : below);
            out[c] = (gradient - constants[c] - (value - means[c]) * by_values[c]) * scales[c];
          }
        });
      },
      const_cast<void*>(grad), const_cast<void*>(x), grad_x);
}
