// One scale of the mirror loss, and its gradient by the student's map: four passes over the maps.

#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.h"

namespace {

using namespace iaml;

// body(block, first pixel, last pixel) for each block of an image's pixels; the sum of what it returns, in order
template <typename Body>
double sum_over_blocks(int64_t pixels, const Body& body) {
  const int64_t blocks = (pixels + BLOCK_PIXELS - 1) / BLOCK_PIXELS;
  std::vector<double> parts(blocks);
  for (int64_t block = 0; block < blocks; block++) parts[block] = body(block * pixels / blocks, (block + 1) * pixels / blocks);
  double total = 0;
  for (double part : parts) total += part;
  return total;
}

struct Statistics {
  float mean, deviation;
};

template <typename T>
Statistics standardise(const T* __restrict__ map, int64_t channels, int64_t pixels) {
  const int64_t count = channels * pixels;
  const double mean = sum_over_blocks(pixels, [&](int64_t first, int64_t last) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first * channels; i < last * channels; i++) sum += static_cast<float>(map[i]);
    return sum;
  }) / count;
  const double squares = sum_over_blocks(pixels, [&](int64_t first, int64_t last) {
    float sum = 0;
    const float centre = mean;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first * channels; i < last * channels; i++) {
      const float difference = static_cast<float>(map[i]) - centre;
      sum += difference * difference;
    }
    return sum;
  });
  return {static_cast<float>(mean), static_cast<float>(std::sqrt(squares / (count - 1)))};
}

// what a block of pixels is compared by: z(u) - z(t) = u scale_u - t scale_t + shift
struct Comparison {
  float scale_u, scale_t, shift;

  // the emphasis of a value's pixel, with the sign of the difference there
  float slope(float u, float t, float emphasis, float& difference) const {
    difference = u * scale_u - t * scale_t + shift;
    return ((difference > 0) - (difference < 0)) * emphasis;
  }
};

// body(values' emphasis, first value, last value) for each block of an image's pixels
template <typename Body>
double sum_with_emphasis(const float* emphasis, int64_t channels, int64_t pixels, const Body& body) {
  std::vector<float> by_value(2 * BLOCK_PIXELS * channels);
  return sum_over_blocks(pixels, [&](int64_t first, int64_t last) {
    for (int64_t pixel = first; pixel < last; pixel++)
      std::fill_n(by_value.data() + (pixel - first) * channels, channels, emphasis[pixel]);
    return body(by_value.data(), first * channels, last * channels);
  });
}

// the mean of W |z(u) - z(t)| over an image; in `grad`, its gradient by u
template <typename T>
double compare(const T* u, const T* t, const float* emphasis, int64_t channels, int64_t pixels, float epsilon, T* grad) {
  const Statistics of_u = standardise(u, channels, pixels), of_t = standardise(t, channels, pixels);
  const float scale_u = 1 / (of_u.deviation + epsilon), scale_t = 1 / (of_t.deviation + epsilon);
  const Comparison by{scale_u, scale_t, of_t.mean * scale_t - of_u.mean * scale_u};
  double slopes = 0, products = 0;
  const double total = sum_with_emphasis(emphasis, channels, pixels, [&](const float* weights, int64_t first, int64_t last) {
    const T *__restrict__ student = u + first, *__restrict__ teacher = t + first;
    const float mean = of_u.mean;
    float sum = 0, slope_sum = 0, product_sum = 0;
#pragma omp simd reduction(+ : sum, slope_sum, product_sum)
    for (int64_t i = 0; i < last - first; i++) {
      const float value = student[i];
      float difference;
      const float slope = by.slope(value, teacher[i], weights[i], difference);
      sum += slope * difference;
      slope_sum += slope;
      product_sum += slope * (value - mean);
    }
    slopes += slope_sum;
    products += product_sum;
    return sum;
  });
  const int64_t count = channels * pixels;
  const float share = scale_u / count, through_mean = slopes / count;
  const float through_deviation = of_u.deviation > 0 ? products * scale_u / ((count - 1) * of_u.deviation) : 0;
  sum_with_emphasis(emphasis, channels, pixels, [&](const float* weights, int64_t first, int64_t last) {
    const T *__restrict__ student = u + first, *__restrict__ teacher = t + first;
    const float *__restrict__ weight = weights, mean = of_u.mean;
    T* __restrict__ out = grad + first;
    for (int64_t i = 0; i < last - first; i++) {
      const float value = student[i];
      float difference;
      const float slope = by.slope(value, teacher[i], weight[i], difference);
      out[i] = share * (slope - through_mean - (value - mean) * through_deviation);
    }
    return 0;
  });
  return total / count;
}

}  // namespace

// by image, the mean of W |z(u) - z(t)|; and its gradient by u
extern "C" void mirror(const Shape& shape, const void* u, const void* t, const float* emphasis, float epsilon,
                       float* means, void* grad) {
  with_type(
      shape,
      [&](const auto* student, const auto* teacher, auto* gradients) {
        in_parallel(shape.images, [&](int64_t image) {
          const int64_t start = image * shape.values();
          means[image] = compare(student + start, teacher + start, emphasis + image * shape.pixels(), shape.channels,
                                 shape.pixels(), epsilon, gradients + start);
        });
      },
      const_cast<void*>(u), const_cast<void*>(t), grad);
}
