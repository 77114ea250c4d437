// Mean SSIM of each image with a Gaussian window, and its gradient, in one visit of the images.
//
// Channels last and channels first alike are rows of values in which a pixel's neighbour lies `step` values on, so that
// blurring a row is a sum of shifted rows.

#include <algorithm>
#include <cmath>
#include <vector>

#include "blocks.h"

namespace {

using namespace iaml;

constexpr int64_t WINDOW = 11;

struct Window {
  float weights[WINDOW];

  explicit Window(double sigma) {
    double total = 0;
    for (int64_t i = 0; i < WINDOW; i++) total += std::exp(-std::pow(i - WINDOW / 2, 2) / (2 * sigma * sigma));
    for (int64_t i = 0; i < WINDOW; i++)
      weights[i] = std::exp(-std::pow(i - WINDOW / 2, 2) / (2 * sigma * sigma)) / total;
  }
};

// rows of one plane, or of all of an image's planes side by side
struct Rows {
  int64_t height, length, step;

  int64_t blurred_height() const { return height - WINDOW + 1; }
  int64_t blurred_length() const { return length - (WINDOW - 1) * step; }
};

void blur_row(const float* __restrict__ in, const Window& window, const Rows& rows, float* __restrict__ out) {
  for (int64_t x = 0; x < rows.blurred_length(); x++) {
    float sum = 0;
    for (int64_t i = 0; i < WINDOW; i++) sum += window.weights[i] * in[x + i * rows.step];
    out[x] = sum;
  }
}

// sum over WINDOW rows, `stride` values apart
void blur_column(const float* __restrict__ in, const Window& window, int64_t length, float* __restrict__ out) {
  for (int64_t x = 0; x < length; x++) {
    float sum = 0;
    for (int64_t i = 0; i < WINDOW; i++) sum += window.weights[i] * in[x + i * length];
    out[x] = sum;
  }
}

// The moments of both images along rows: means of a, b, a^2 + b^2 and a b. SSIM needs the variances' sum alone.
constexpr int64_t MOMENTS = 4;
// What the gradient is made of: SSIM's derivatives by the means of a, of a^2 + b^2 and of a b.
constexpr int64_t SLOPES = 3;

struct Constants {
  float c1, c2;
};

// SSIM over one row, summed; in `slopes`, its derivatives
double compare_row(const float* __restrict__ moments, int64_t length, const Constants& constants,
                   float* __restrict__ slopes) {
  const auto [c1, c2] = constants;
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t x = 0; x < length; x++) {
    const float a = moments[x], b = moments[length + x];
    const float luminance_below = a * a + b * b + c1, structure_below = moments[2 * length + x] - a * a - b * b + c2;
    const float luminance = (2 * a * b + c1) / luminance_below;
    const float structure = (2 * (moments[3 * length + x] - a * b) + c2) / structure_below;
    total += luminance * structure;
    slopes[x] = 2 * structure * (b - luminance * a) / luminance_below + 2 * luminance * (structure * a - b) / structure_below;
    slopes[length + x] = -luminance * structure / structure_below;
    slopes[2 * length + x] = 2 * luminance / structure_below;
  }
  return total;
}

// sum of SSIM over the places of the window; in `grad`, its gradient by a
double compare(const float* a, const float* b, const Window& window, const Constants& constants, const Rows& rows,
               float* grad) {
  const int64_t length = rows.length, short_length = rows.blurred_length(), margin = (WINDOW - 1) * rows.step;
  const int64_t height = rows.height, short_height = rows.blurred_height();
  std::vector<float> along(MOMENTS * height * short_length), values(MOMENTS * length);
  for (int64_t y = 0; y < height; y++) {
    const float* __restrict__ row_a = a + y * length;
    const float* __restrict__ row_b = b + y * length;
    float* __restrict__ products = values.data();
    for (int64_t x = 0; x < length; x++) {
      products[x] = row_a[x] * row_a[x] + row_b[x] * row_b[x];
      products[length + x] = row_a[x] * row_b[x];
    }
    const float* sources[MOMENTS] = {row_a, row_b, products, products + length};
    for (int64_t moment = 0; moment < MOMENTS; moment++)
      blur_row(sources[moment], window, rows, along.data() + (moment * height + y) * short_length);
  }
  // derivatives, blurred back along rows: a margin on both sides of each takes what the window reaches
  std::vector<float> moments(MOMENTS * short_length), slopes(SLOPES * short_length), padded(length + margin);
  std::vector<float> back(SLOPES * (height + WINDOW - 1) * length);
  const Rows wide{1, length + margin, rows.step};
  double total = 0;
  for (int64_t y = 0; y < short_height; y++) {
    for (int64_t moment = 0; moment < MOMENTS; moment++)
      blur_column(along.data() + (moment * height + y) * short_length, window, short_length,
                  moments.data() + moment * short_length);
    total += compare_row(moments.data(), short_length, constants, slopes.data());
    for (int64_t slope = 0; slope < SLOPES; slope++) {
      std::copy_n(slopes.data() + slope * short_length, short_length, padded.data() + margin);
      blur_row(padded.data(), window, wide, back.data() + (slope * (height + WINDOW - 1) + y + WINDOW - 1) * length);
    }
  }
  std::vector<float> sums(SLOPES * length);
  for (int64_t y = 0; y < height; y++) {
    for (int64_t slope = 0; slope < SLOPES; slope++)
      blur_column(back.data() + (slope * (height + WINDOW - 1) + y) * length, window, length, sums.data() + slope * length);
    const float* __restrict__ sum = sums.data();
    const float* __restrict__ row_a = a + y * length;
    const float* __restrict__ row_b = b + y * length;
    float* __restrict__ out = grad + y * length;
    for (int64_t x = 0; x < length; x++)
      out[x] = sum[x] + 2 * row_a[x] * sum[length + x] + row_b[x] * sum[2 * length + x];
  }
  return total;
}

}  // namespace

// by image, the mean SSIM of a and b, float32; and its gradient by a
extern "C" void similarity(const Shape& shape, int64_t channels_last, const float* a, const float* b, double sigma,
                           float c1, float c2, float* means, float* grad) {
  const Rows rows = channels_last ? Rows{shape.height, shape.width * shape.channels, shape.channels}
                                  : Rows{shape.height, shape.width, 1};
  const int64_t planes = channels_last ? 1 : shape.channels, size = rows.height * rows.length;
  const double places = static_cast<double>(shape.channels) * rows.blurred_height() * (shape.width - WINDOW + 1);
  const Window window(sigma);
  in_parallel(shape.images, [&](int64_t image) {
    double total = 0;
    for (int64_t plane = image * planes; plane < (image + 1) * planes; plane++)
      total += compare(a + plane * size, b + plane * size, window, {c1, c2}, rows, grad + plane * size);
    means[image] = total / places;
    const float share = 1 / places;
    for (int64_t i = image * planes * size; i < (image + 1) * planes * size; i++) grad[i] *= share;
  });
}
