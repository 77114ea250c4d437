// The head's end: a ReLU, then a 3x3 convolution to the three channels of an image; forward and backward.
//
// General convolutions waste most of their lanes on three output channels. Here the lanes are the input's channels: rows
// of maps are copied to float32, activated, with a margin of zeros around them, and their channels filled up to lanes.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "blocks.h"

namespace {

using namespace iaml;

constexpr int64_t COLOURS = 3, SIDE = 3, TAPS = SIDE * SIDE;
constexpr int64_t BLOCK_ROWS = 16;
constexpr int64_t FEW = 8;  // channels that narrow vectors hold

template <int64_t COUNT>
struct Lanes {
  typedef float type __attribute__((vector_size(COUNT * sizeof(float))));
};

// floats that start where a cache line does, so that no vector lies in two
class Floats {
 public:
  explicit Floats(int64_t size) : lines_((size + Line::SIZE - 1) / Line::SIZE) {}
  float* data() { return lines_.data()->values; }
  const float* data() const { return lines_.data()->values; }

 private:
  struct alignas(64) Line {
    static constexpr int64_t SIZE = 16;
    float values[SIZE] = {};
  };
  std::vector<Line> lines_;
};

template <typename Vector>
Vector load(const float* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename Vector>
void add_to(float* to, const Vector& value) {
  const Vector sum = load<Vector>(to) + value;
  std::memcpy(to, &sum, sizeof sum);
}

template <int64_t COUNT>
float sum_lanes(const typename Lanes<COUNT>::type& vector) {
  if constexpr (COUNT == 2) {
    return vector[0] + vector[1];
  } else {
    typename Lanes<COUNT / 2>::type halves[2];
    std::memcpy(halves, &vector, sizeof halves);
    return sum_lanes<COUNT / 2>(halves[0] + halves[1]);
  }
}

template <int64_t COUNT>
int64_t fill_up(int64_t channels) {
  return (channels + COUNT - 1) / COUNT * COUNT;
}

// The rows around one row, each with a pixel more at both ends; rows and pixels outside of the image are zero.
class Around {
 public:
  Around(int64_t width, int64_t channels) : length_((width + 2) * channels), values_(SIDE * length_) {}

  // write(row, first pixel) for each row around `row` that was not around the row before
  template <typename Write>
  void move_to(int64_t row, int64_t height, int64_t channels, const Write& write) {
    const int64_t known = row == row_ + 1 ? row_ + SIDE / 2 : row - SIDE / 2 - 1;
    for (int64_t next = known + 1; next <= row + SIDE / 2; next++) {
      float* place = values_.data() + (next + SIDE) % SIDE * length_;
      if (next < 0 || next >= height)
        std::fill_n(place, length_, 0.f);
      else
        write(next, place + channels);
    }
    row_ = row;
  }

  // the row before, the row and the row after, each from the pixel left of its first on
  struct Rows {
    const float* of[SIDE];
  };
  Rows rows() const {
    Rows rows;
    for (int64_t tap = 0; tap < SIDE; tap++)
      rows.of[tap] = values_.data() + (row_ + tap - SIDE / 2 + SIDE) % SIDE * length_;
    return rows;
  }

 private:
  int64_t length_, row_ = -2 * SIDE;
  Floats values_;
};

// weights as (tap, colour, channel), channels filled up; from (colour, channel, tap)
Floats arrange(const float* weight, int64_t channels, int64_t lanes) {
  Floats arranged(TAPS * COLOURS * lanes);
  for (int64_t colour = 0; colour < COLOURS; colour++)
    for (int64_t c = 0; c < channels; c++)
      for (int64_t tap = 0; tap < TAPS; tap++)
        arranged.data()[(tap * COLOURS + colour) * lanes + c] = weight[(colour * channels + c) * TAPS + tap];
  return arranged;
}

// body(image, block, first row, last row), on all threads
template <typename Body>
void for_rows(const Shape& shape, const Body& body) {
  const int64_t blocks = (shape.height + BLOCK_ROWS - 1) / BLOCK_ROWS;
  in_parallel(shape.images * blocks, [&](int64_t task) {
    const int64_t block = task % blocks, first = block * BLOCK_ROWS;
    body(task / blocks, task, first, std::min(first + BLOCK_ROWS, shape.height));
  });
}

// body(a value's place, its place where channels are filled up) for the values of a row
template <typename Body>
void for_values(int64_t width, int64_t channels, int64_t lanes, const Body& body) {
  if (channels == lanes) channels = lanes = width * channels, width = 1;  // one long loop
  for (int64_t x = 0; x < width; x++)
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) body(x * channels + c, x * lanes + c);
}

// the rows around `row` of an image's maps, activated
template <typename Value>
void activate_around(Around& maps, int64_t row, const Shape& shape, const Value* x, int64_t lanes) {
  maps.move_to(row, shape.height, lanes, [&](int64_t next, float* place) {
    const Value* in = x + next * shape.width * shape.channels;
    for_values(shape.width, shape.channels, lanes, [&](int64_t from, int64_t to) {
      const float value = in[from];
      place[to] = value < 0 ? 0 : value;
    });
  });
}

// the colours of PIXELS pixels from `x` on
template <int64_t COUNT, int64_t PIXELS>
void convolve(const Around::Rows& maps, const float* weights, const float* bias, int64_t lanes, int64_t x, float* out) {
  using Vector = typename Lanes<COUNT>::type;
  Vector sums[PIXELS][COLOURS] = {};
  for (int64_t tap = 0; tap < TAPS; tap++)
    for (int64_t c = 0; c < lanes; c += COUNT) {
      const float* from = maps.of[tap / SIDE] + (x + tap % SIDE) * lanes + c;
      const float* of_tap = weights + tap * COLOURS * lanes + c;
#pragma GCC unroll 8
      for (int64_t colour = 0; colour < COLOURS; colour++) {
        const Vector weight = load<Vector>(of_tap + colour * lanes);
#pragma GCC unroll 8
        for (int64_t pixel = 0; pixel < PIXELS; pixel++)
          sums[pixel][colour] += load<Vector>(from + pixel * lanes) * weight;
      }
    }
  for (int64_t pixel = 0; pixel < PIXELS; pixel++)
    for (int64_t colour = 0; colour < COLOURS; colour++)
      out[(x + pixel) * COLOURS + colour] = sum_lanes<COUNT>(sums[pixel][colour]) + bias[colour];
}

// what PIXELS pixels from `x` on pass back to COUNT channels
template <int64_t COUNT, int64_t PIXELS>
void convolve_back(const Around::Rows& grads, const float* weights, int64_t lanes, int64_t x, float* out) {
  using Vector = typename Lanes<COUNT>::type;
  Vector sums[PIXELS] = {};
  for (int64_t tap = 0; tap < TAPS; tap++) {
    const float* from = grads.of[SIDE - 1 - tap / SIDE] + (x + SIDE - 1 - tap % SIDE) * COLOURS;
#pragma GCC unroll 8
    for (int64_t colour = 0; colour < COLOURS; colour++) {
      const Vector weight = load<Vector>(weights + (tap * COLOURS + colour) * lanes);
#pragma GCC unroll 8
      for (int64_t pixel = 0; pixel < PIXELS; pixel++) sums[pixel] += from[pixel * COLOURS + colour] * weight;
    }
  }
  for (int64_t pixel = 0; pixel < PIXELS; pixel++) std::memcpy(out + (x + pixel) * lanes, &sums[pixel], sizeof(Vector));
}

// adds a row's part of the weights' gradient, for COUNT channels and a row of the window
template <int64_t COUNT>
void correlate(const float* maps, const float* grads, int64_t width, int64_t lanes, float* sums) {
  using Vector = typename Lanes<COUNT>::type;
  Vector parts[SIDE][COLOURS] = {};
  for (int64_t x = 0; x < width; x++)
#pragma GCC unroll 8
    for (int64_t tap = 0; tap < SIDE; tap++) {
      const Vector value = load<Vector>(maps + (x + tap) * lanes);
#pragma GCC unroll 8
      for (int64_t colour = 0; colour < COLOURS; colour++) parts[tap][colour] += grads[x * COLOURS + colour] * value;
    }
  for (int64_t tap = 0; tap < SIDE; tap++)
    for (int64_t colour = 0; colour < COLOURS; colour++)
      add_to(sums + (tap * COLOURS + colour) * lanes, parts[tap][colour]);
}

constexpr int64_t TOGETHER = 4;  // pixels that share what is loaded

// body(first pixel, how many as a constant) for all pixels of a row
template <typename Body>
void for_pixels_of_row(int64_t width, const Body& body) {
  int64_t x = 0;
  for (; x + TOGETHER <= width; x += TOGETHER) body(x, std::integral_constant<int64_t, TOGETHER>());
  for (; x < width; x++) body(x, std::integral_constant<int64_t, 1>());
}

template <int64_t COUNT, typename Value>
void to_image(const Shape& shape, const Value* x, const float* weight, const float* bias, float* y) {
  const int64_t width = shape.width, channels = shape.channels, lanes = fill_up<COUNT>(channels);
  const auto weights = arrange(weight, channels, lanes);
  for_rows(shape, [&](int64_t image, int64_t, int64_t first, int64_t last) {
    Around maps(width, lanes);
    for (int64_t row = first; row < last; row++) {
      activate_around(maps, row, shape, x + image * shape.values(), lanes);
      const auto rows = maps.rows();
      float* out = y + (image * shape.height + row) * width * COLOURS;
      for_pixels_of_row(width, [&](int64_t from, auto pixels) {
        convolve<COUNT, pixels.value>(rows, weights.data(), bias, lanes, from, out);
      });
    }
  });
}

template <int64_t COUNT, typename Value>
void to_image_backward(const Shape& shape, const float* grad, const Value* x, const float* weight, Value* grad_x,
                       float* grad_weight, float* grad_bias) {
  const int64_t width = shape.width, height = shape.height, channels = shape.channels, lanes = fill_up<COUNT>(channels);
  const int64_t tasks = shape.images * ((height + BLOCK_ROWS - 1) / BLOCK_ROWS), size = TAPS * COLOURS * lanes + COLOURS;
  const auto weights = arrange(weight, channels, lanes);
  std::vector<float> parts(tasks * size);
  for_rows(shape, [&](int64_t image, int64_t task, int64_t first, int64_t last) {
    Around maps(width, lanes), grads(width, COLOURS);
    Floats back(width * lanes);
    float* sums = parts.data() + task * size;
    const float* of_image = grad + image * height * width * COLOURS;
    for (int64_t row = first; row < last; row++) {
      activate_around(maps, row, shape, x + image * shape.values(), lanes);
      grads.move_to(row, height, COLOURS, [&](int64_t next, float* place) {
        std::copy_n(of_image + next * width * COLOURS, width * COLOURS, place);
      });
      const auto map_rows = maps.rows(), grad_rows = grads.rows();
      const float* of_row = of_image + row * width * COLOURS;
      for (int64_t i = 0; i < width * COLOURS; i++) sums[size - COLOURS + i % COLOURS] += of_row[i];
      for (int64_t c = 0; c < lanes; c += COUNT) {
        for (int64_t tap = 0; tap < SIDE; tap++)
          correlate<COUNT>(map_rows.of[tap] + c, of_row, width, lanes, sums + tap * SIDE * COLOURS * lanes + c);
        for_pixels_of_row(width, [&](int64_t from, auto pixels) {
          convolve_back<COUNT, pixels.value>(grad_rows, weights.data() + c, lanes, from, back.data() + c);
        });
      }
      const int64_t place = image * shape.values() + row * width * channels;
      const Value* in = x + place;
      Value* out = grad_x + place;
      const float* passed = back.data();
      for_values(width, channels, lanes, [&](int64_t to, int64_t from) {
        const float value = in[to];
        out[to] = value > 0 ? passed[from] : 0.f;
      });
    }
  });
  std::vector<double> total(size);
  for (int64_t task = 0; task < tasks; task++)
    for (int64_t i = 0; i < size; i++) total[i] += parts[task * size + i];
  for (int64_t colour = 0; colour < COLOURS; colour++) {
    for (int64_t c = 0; c < channels; c++)
      for (int64_t tap = 0; tap < TAPS; tap++)
        grad_weight[(colour * channels + c) * TAPS + tap] = total[(tap * COLOURS + colour) * lanes + c];
    grad_bias[colour] = total[size - COLOURS + colour];
  }
}

}  // namespace

// y = convolution of relu(x), float32; weight as (colour, channel, tap)
extern "C" void to_image(const Shape& shape, const void* x, const float* weight, const float* bias, float* y) {
  with_type(
      shape,
      [&](const auto* values) {
        shape.channels <= FEW ? to_image<FEW>(shape, values, weight, bias, y)
                              : to_image<2 * FEW>(shape, values, weight, bias, y);
      },
      const_cast<void*>(x));
}

// gradients of x, weight and bias
extern "C" void to_image_backward(const Shape& shape, const float* grad, const void* x, const float* weight,
                                  void* grad_x, float* grad_weight, float* grad_bias) {
  with_type(
      shape,
      [&](const auto* values, auto* result) {
        shape.channels <= FEW ? to_image_backward<FEW>(shape, grad, values, weight, result, grad_weight, grad_bias)
                              : to_image_backward<2 * FEW>(shape, grad, values, weight, result, grad_weight, grad_bias);
      },
      const_cast<void*>(x), grad_x);
}
