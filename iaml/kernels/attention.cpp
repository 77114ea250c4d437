// CBAM in as few passes over the feature maps as its pools allow: three forward, four backward.
//
// Gates are float32 whatever the maps' type.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "blocks.h"

namespace {

using namespace iaml;

constexpr int64_t WINDOW = 7, MARGIN = WINDOW / 2;
constexpr int64_t LANES = 16;  // pixels that are worked on together
using Lanes = float __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

const Lanes& load(const float* place) { return *reinterpret_cast<const Lanes*>(place); }

// over the pixels of each image, by channel: mean, maximum, and how many pixels have the maximum
template <typename T>
void pool_pixels(const T* x, const Shape& shape, float* mean, float* most, float* ties) {
  const int64_t channels = shape.channels, blocks = shape.blocks();
  std::vector<float> parts(shape.images * blocks * 3 * channels);
  for_blocks(shape, [&](int64_t image, int64_t block, int64_t first, int64_t last) {
    float* __restrict__ sum = parts.data() + (image * blocks + block) * 3 * channels;
    float* __restrict__ top = sum + channels;
    float* __restrict__ count = top + channels;
    std::fill(sum, sum + channels, 0.f);
    std::fill(top, top + channels, -std::numeric_limits<float>::infinity());
    for (int64_t pixel = first; pixel < last; pixel++) {
      const T* __restrict__ row = x + (image * shape.pixels() + pixel) * channels;
      for (int64_t c = 0; c < channels; c++) {
        const float value = row[c];
        sum[c] += value;
        count[c] = value > top[c] ? 1.f : count[c] + (value == top[c] ? 1.f : 0.f);
        top[c] = value > top[c] ? value : top[c];
      }
    }
  });
  const float share = 1.f / shape.pixels();
  for (int64_t image = 0; image < shape.images; image++) {
    for (int64_t c = 0; c < channels; c++) {
      float sum = 0, top = -std::numeric_limits<float>::infinity(), count = 0;
      for (int64_t block = 0; block < blocks; block++) {
        const float* part = parts.data() + (image * blocks + block) * 3 * channels;
        sum += part[c];
        const float value = part[channels + c], tied = part[2 * channels + c];
        count = value > top ? tied : count + (value == top ? tied : 0.f);
        top = value > top ? value : top;
      }
      mean[image * channels + c] = sum * share;
      most[image * channels + c] = top;
      ties[image * channels + c] = count;
    }
  }
}

// over the gated channels of each pixel: mean and maximum, as two planes an image, and how many have the maximum
template <typename T>
void pool_channels(const T* x, const float* gate, const Shape& shape, float* pooled, float* ties) {
  const int64_t channels = shape.channels, pixels = shape.pixels();
  for_blocks(shape, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    const float* __restrict__ g = gate + image * channels;
    for (int64_t pixel = first; pixel < last; pixel++) {
      const T* __restrict__ row = x + (image * pixels + pixel) * channels;
      float sum = 0, top = -std::numeric_limits<float>::infinity(), count = 0;
#pragma omp simd reduction(+ : sum) reduction(max : top)
      for (int64_t c = 0; c < channels; c++) {
        const float value = static_cast<float>(row[c]) * g[c];
        sum += value;
        top = value > top ? value : top;
      }
#pragma omp simd reduction(+ : count)
      for (int64_t c = 0; c < channels; c++) count += static_cast<float>(row[c]) * g[c] == top ? 1.f : 0.f;
      pooled[image * 2 * pixels + pixel] = sum / channels;
      pooled[(image * 2 + 1) * pixels + pixel] = top;
      ties[image * pixels + pixel] = count;
    }
  });
}

// planes with a margin of zeros around them, wide enough that whole vectors can be read from any pixel on
struct Padded {
  int64_t rows, stride;
  std::vector<float> values;

  Padded(const float* planes, int64_t count, int64_t height, int64_t width)
      : rows(height + 2 * MARGIN), stride((width + LANES - 1) / LANES * LANES + 2 * MARGIN), values(count * rows * stride) {
    for (int64_t row = 0; row < count * height; row++)
      std::copy_n(planes + row * width, width, values.data() + (row / height * rows + row % height + MARGIN) * stride + MARGIN);
  }

  // the pixel (y - MARGIN, x - MARGIN) of a plane
  const float* at(int64_t plane, int64_t y, int64_t x) const { return values.data() + (plane * rows + y) * stride + x; }
};

// the window's product with what lies around LANES pixels side by side, the first of them (y, x)
Lanes correlate(const Padded& padded, int64_t plane, int64_t y, int64_t x, const float* window) {
  Lanes sum = {};
  for (int64_t i = 0; i < WINDOW; i++)
    for (int64_t j = 0; j < WINDOW; j++) sum += window[i * WINDOW + j] * load(padded.at(plane, y + i, x + j));
  return sum;
}

// the sigmoid of a 7x7 convolution of the two pooled planes
void gate_pixels(const float* pooled, const float* window, const Shape& shape, float* gate) {
  const Padded padded(pooled, 2 * shape.images, shape.height, shape.width);
  in_parallel(shape.images * shape.height, [&](int64_t row) {
    const int64_t image = row / shape.height, y = row % shape.height;
    for (int64_t x = 0; x < shape.width; x += LANES) {
      const Lanes sum = correlate(padded, 2 * image, y, x, window) +
                        correlate(padded, 2 * image + 1, y, x, window + WINDOW * WINDOW);
      for (int64_t lane = 0; lane < std::min(LANES, shape.width - x); lane++)
        gate[row * shape.width + x + lane] = 1.f / (1.f + std::exp(-sum[lane]));
    }
  });
}

// gradient of the pooled planes and of the window, from that of the convolution's result
void gate_pixels_backward(const float* grad, const float* pooled, const float* window, const Shape& shape,
                          float* grad_pooled, float* grad_window) {
  constexpr int64_t TAPS = 2 * WINDOW * WINDOW;
  const int64_t images = shape.images, height = shape.height, width = shape.width;
  const Padded padded(pooled, 2 * images, height, width), padded_grad(grad, images, height, width);
  float flipped[TAPS];
  for (int64_t tap = 0; tap < TAPS; tap++) flipped[tap] = window[tap / (TAPS / 2) * (TAPS / 2) + TAPS / 2 - 1 - tap % (TAPS / 2)];
  in_parallel(images * 2 * height, [&](int64_t row) {
    const int64_t image = row / (2 * height), plane = row / height % 2, y = row % height;
    for (int64_t x = 0; x < width; x += LANES) {
      const Lanes sum = correlate(padded_grad, image, y, x, flipped + plane * WINDOW * WINDOW);
      for (int64_t lane = 0; lane < std::min(LANES, width - x); lane++) grad_pooled[row * width + x + lane] = sum[lane];
    }
  });
  std::vector<float> parts(images * TAPS);
  in_parallel(images * 2 * WINDOW, [&](int64_t task) {
    const int64_t image = task / (2 * WINDOW), plane = task / WINDOW % 2, i = task % WINDOW;
    Lanes sums[WINDOW] = {};
    for (int64_t y = 0; y < height; y++)
      for (int64_t x = 0; x < width; x += LANES) {
        const Lanes g = load(padded_grad.at(image, y + MARGIN, x + MARGIN));
        for (int64_t j = 0; j < WINDOW; j++) sums[j] += g * load(padded.at(2 * image + plane, y + i, x + j));
      }
    for (int64_t j = 0; j < WINDOW; j++)
      for (int64_t lane = 0; lane < LANES; lane++) parts[task * WINDOW + j] += sums[j][lane];
  });
  for (int64_t tap = 0; tap < TAPS; tap++) {
    float sum = 0;
    for (int64_t image = 0; image < images; image++) sum += parts[image * TAPS + tap];
    grad_window[tap] = sum;
  }
}

template <typename T>
void scale(const T* x, const float* channel_gate, const float* pixel_gate, const Shape& shape, T* y) {
  const int64_t channels = shape.channels, pixels = shape.pixels();
  for_blocks(shape, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    const float* __restrict__ g = channel_gate + image * channels;
    for (int64_t pixel = image * pixels + first; pixel < image * pixels + last; pixel++) {
      const float s = pixel_gate[pixel];
      const T* __restrict__ in = x + pixel * channels;
      T* __restrict__ out = y + pixel * channels;
      for (int64_t c = 0; c < channels; c++) out[c] = static_cast<float>(in[c]) * g[c] * s;
    }
  });
}

// gradient of the pixel gates' logits: sum over c of grad * x * gate, times the sigmoid's slope
template <typename T>
void pixel_gate_backward(const T* grad, const T* x, const float* channel_gate, const float* pixel_gate,
                         const Shape& shape, float* grad_logit) {
  const int64_t channels = shape.channels, pixels = shape.pixels();
  for_blocks(shape, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    const float* __restrict__ g = channel_gate + image * channels;
    for (int64_t pixel = image * pixels + first; pixel < image * pixels + last; pixel++) {
      const T* __restrict__ in = x + pixel * channels;
      const T* __restrict__ gy = grad + pixel * channels;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < channels; c++) sum += static_cast<float>(gy[c]) * static_cast<float>(in[c]) * g[c];
      grad_logit[pixel] = sum * pixel_gate[pixel] * (1.f - pixel_gate[pixel]);
    }
  });
}

// what the gradient of the channel-gated maps is made of: that through the pixel gate, and through both pools
struct Gated {
  const float *channel_gate, *pixel_gate, *grad_pooled, *pooled, *ties;

  template <typename T, typename Body>
  void for_pixel(const T* grad, const T* x, const Shape& shape, int64_t image, int64_t pixel, const Body& body) const {
    const int64_t channels = shape.channels, pixels = shape.pixels(), place = image * pixels + pixel;
    const float s = pixel_gate[place], through_mean = grad_pooled[image * 2 * pixels + pixel] / channels;
    const float through_max = grad_pooled[(image * 2 + 1) * pixels + pixel] / ties[place];
    const float top = pooled[(image * 2 + 1) * pixels + pixel];
    const T* __restrict__ in = x + place * channels;
    const T* __restrict__ gy = grad + place * channels;
    const float* __restrict__ g = channel_gate + image * channels;
    body([=](int64_t c) {
      const float value = in[c];
      return std::pair(value,
                       static_cast<float>(gy[c]) * s + through_mean + (value * g[c] == top ? through_max : 0.f));
    });
  }
};

// gradient of the channel gates: sum over the pixels
template <typename T>
void channel_gate_backward(const T* grad, const T* x, const Gated& gated, const Shape& shape, float* grad_gate) {
  const int64_t channels = shape.channels, blocks = shape.blocks();
  std::vector<float> parts(shape.images * blocks * channels);
  for_blocks(shape, [&](int64_t image, int64_t block, int64_t first, int64_t last) {
    float* __restrict__ sum = parts.data() + (image * blocks + block) * channels;
    for (int64_t pixel = first; pixel < last; pixel++)
      gated.for_pixel(grad, x, shape, image, pixel, [&](auto at) {
        for (int64_t c = 0; c < channels; c++) {
          const auto [value, gradient] = at(c);
          sum[c] += gradient * value;
        }
      });
  });
  for (int64_t image = 0; image < shape.images; image++)
    for (int64_t c = 0; c < channels; c++) {
      float sum = 0;
      for (int64_t block = 0; block < blocks; block++) sum += parts[(image * blocks + block) * channels + c];
      grad_gate[image * channels + c] = sum;
    }
}

// gradient of x: through the gates, and through mean and maximum over the pixels
template <typename T>
void input_backward(const T* grad, const T* x, const Gated& gated, const float* grad_mean, const float* grad_most,
                    const float* most, const float* ties, const Shape& shape, T* grad_x) {
  const int64_t channels = shape.channels;
  for_blocks(shape, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    std::vector<float> means(channels), maxima(channels);
    for (int64_t c = 0; c < channels; c++) {
      means[c] = grad_mean[image * channels + c] / shape.pixels();
      maxima[c] = grad_most[image * channels + c] / ties[image * channels + c];
    }
    const float* __restrict__ gate = gated.channel_gate + image * channels;
    const float* __restrict__ top = most + image * channels;
    const float* __restrict__ through_mean = means.data();
    const float* __restrict__ through_max = maxima.data();
    for (int64_t pixel = first; pixel < last; pixel++)
      gated.for_pixel(grad, x, shape, image, pixel, [&](auto at) {
        T* __restrict__ out = grad_x + (image * shape.pixels() + pixel) * channels;
        for (int64_t c = 0; c < channels; c++) {
          const auto [value, gradient] = at(c);
          out[c] = gradient * gate[c] + through_mean[c] + (value == top[c] ? through_max[c] : 0.f);
        }
      });
  });
}

// The channel gates' MLP, sigmoid(w2 relu(w1 pool + b1) + b2) of the means and of the maxima of each image.
struct Mlp {
  const float *w1, *b1, *w2, *b2;  // (hidden, channels), (hidden), (channels, hidden), (channels)
  int64_t channels, hidden;

  // the hidden values and the gates of one pool
  void forward(const float* __restrict__ pool, float* __restrict__ inner, float* __restrict__ gates) const {
    for (int64_t h = 0; h < hidden; h++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < channels; c++) sum += w1[h * channels + c] * pool[c];
      inner[h] = std::max(sum + b1[h], 0.f);
    }
    for (int64_t c = 0; c < channels; c++) {
      float sum = b2[c];
      for (int64_t h = 0; h < hidden; h++) sum += w2[c * hidden + h] * inner[h];
      gates[c] = 1.f / (1.f + std::exp(-sum));
    }
  }
};

// gradients of the MLP's parameters, to which those of each pool are added
struct MlpGradient {
  float *w1, *b1, *w2, *b2;

  // from the gradient of one pool's gates that of the pool
  void backward(const Mlp& mlp, const float* grad_gates, const float* pool, const float* inner, const float* gates,
                float* __restrict__ grad_pool) const {
    const int64_t channels = mlp.channels, hidden = mlp.hidden;
    std::vector<float> grad_inner(hidden);
    for (int64_t c = 0; c < channels; c++) {
      const float logit = grad_gates[c] * gates[c] * (1.f - gates[c]);
      b2[c] += logit;
      for (int64_t h = 0; h < hidden; h++) {
        w2[c * hidden + h] += logit * inner[h];
        grad_inner[h] += logit * mlp.w2[c * hidden + h];
      }
    }
    std::fill(grad_pool, grad_pool + channels, 0.f);
    for (int64_t h = 0; h < hidden; h++) {
      const float gradient = inner[h] > 0 ? grad_inner[h] : 0.f;
      b1[h] += gradient;
      float* __restrict__ of_weight = w1 + h * channels;
      for (int64_t c = 0; c < channels; c++) {
        of_weight[c] += gradient * pool[c];
        grad_pool[c] += gradient * mlp.w1[h * channels + c];
      }
    }
  }
};

// what the forward pass leaves for the backward pass; of each image 6 values a channel, 2 a hidden value, 4 a pixel
struct Saved {
  float *mean, *most, *most_ties;          // over the pixels, by image and channel
  float *mean_gate, *most_gate, *gate;     // by image and channel; the last is the others' sum
  float *mean_inner, *most_inner;          // the MLP's hidden values, by image
  float *pooled, *pooled_ties, *pixel_gate;  // over the gated channels, by image and pixel: two planes, one, one

  Saved(float* place, const Shape& shape, int64_t hidden) {
    const auto take = [&](int64_t by_image) { return std::exchange(place, place + shape.images * by_image); };
    for (float** of_channels : {&mean, &most, &most_ties, &mean_gate, &most_gate, &gate}) *of_channels = take(shape.channels);
    for (float** of_hidden : {&mean_inner, &most_inner}) *of_hidden = take(hidden);
    pooled = take(2 * shape.pixels());
    for (float** of_pixels : {&pooled_ties, &pixel_gate}) *of_pixels = take(shape.pixels());
  }
};

}  // namespace

// y = x scaled by the gates of the channels, and by those of the pixels, which follow from what that makes
extern "C" void attend(const Shape& shape, const void* x, int64_t hidden, const float* w1, const float* b1,
                       const float* w2, const float* b2, const float* window, float* saved, void* y) {
  const Saved keep(saved, shape, hidden);
  const Mlp mlp{w1, b1, w2, b2, shape.channels, hidden};
  with_type(
      shape,
      [&](const auto* values, auto* out) {
        pool_pixels(values, shape, keep.mean, keep.most, keep.most_ties);
        for (int64_t image = 0; image < shape.images; image++) {
          const int64_t row = image * shape.channels;
          mlp.forward(keep.mean + row, keep.mean_inner + image * hidden, keep.mean_gate + row);
          mlp.forward(keep.most + row, keep.most_inner + image * hidden, keep.most_gate + row);
          for (int64_t c = row; c < row + shape.channels; c++) keep.gate[c] = keep.mean_gate[c] + keep.most_gate[c];
        }
        pool_channels(values, keep.gate, shape, keep.pooled, keep.pooled_ties);
        gate_pixels(keep.pooled, window, shape, keep.pixel_gate);
        scale(values, keep.gate, keep.pixel_gate, shape, out);
      },
      const_cast<void*>(x), y);
}

// gradients of x and of all parameters, those of the MLP added to what is there
extern "C" void attend_backward(const Shape& shape, const void* grad, const void* x, int64_t hidden, const float* w1,
                                const float* w2, const float* window, float* saved, void* grad_x, float* grad_w1,
                                float* grad_b1, float* grad_w2, float* grad_b2, float* grad_window) {
  const Saved kept(saved, shape, hidden);
  const Mlp mlp{w1, nullptr, w2, nullptr, shape.channels, hidden};
  const MlpGradient of_mlp{grad_w1, grad_b1, grad_w2, grad_b2};
  const int64_t of_channels = shape.images * shape.channels;
  std::vector<float> grad_logit(shape.images * shape.pixels()), grad_pooled(2 * shape.images * shape.pixels());
  std::vector<float> grad_gate(of_channels), grad_mean(of_channels), grad_most(of_channels);
  const Gated gated{kept.gate, kept.pixel_gate, grad_pooled.data(), kept.pooled, kept.pooled_ties};
  with_type(
      shape,
      [&](const auto* gradients, const auto* values, auto* out) {
        pixel_gate_backward(gradients, values, kept.gate, kept.pixel_gate, shape, grad_logit.data());
        gate_pixels_backward(grad_logit.data(), kept.pooled, window, shape, grad_pooled.data(), grad_window);
        channel_gate_backward(gradients, values, gated, shape, grad_gate.data());
        for (int64_t image = 0; image < shape.images; image++) {
          const int64_t row = image * shape.channels;
          of_mlp.backward(mlp, &grad_gate[row], kept.mean + row, kept.mean_inner + image * hidden, kept.mean_gate + row,
                          &grad_mean[row]);
          of_mlp.backward(mlp, &grad_gate[row], kept.most + row, kept.most_inner + image * hidden, kept.most_gate + row,
                          &grad_most[row]);
        }
        input_backward(gradients, values, gated, grad_mean.data(), grad_most.data(), kept.most, kept.most_ties, shape,
                       out);
      },
      const_cast<void*>(grad), const_cast<void*>(x), grad_x);
}
