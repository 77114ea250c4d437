// What the kernels share: maps in memory, blocks of pixels to work on, float32 and bfloat16 alike.
//
// Maps are channels last: all channels of a pixel lie side by side, so that the inner loops run over channels and
// vectorise. Sums over pixels are kept by block and added in their order. The number of blocks depends on the maps'
// shape alone, so that the bits are the same on any number of threads.

#pragma once

#include <bit>
#include <cstdint>

namespace iaml {

constexpr int64_t BLOCK_PIXELS = 256;  // about

struct BFloat16 {
  uint16_t bits;

  // ties to even; without a branch, so that loops vectorise
  BFloat16(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value), is_nan = -static_cast<uint32_t>(value != value);
    bits = ((wide + 0x7fff + (wide >> 16 & 1)) & ~is_nan | (wide | 0x400000) & is_nan) >> 16;
  }

  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// of maps in memory; the same struct is passed from Python
struct Shape {
  int64_t bfloat16, images, channels, height, width;

  int64_t pixels() const { return height * width; }
  int64_t values() const { return channels * pixels(); }                             // of an image
  int64_t blocks() const { return (pixels() + BLOCK_PIXELS - 1) / BLOCK_PIXELS; }  // of an image
};

// body(task) for each task from 0 on, on all threads
template <typename Body>
void in_parallel(int64_t tasks, const Body& body) {
#pragma omp parallel for if (tasks > 1)
  for (int64_t task = 0; task < tasks; task++) body(task);
}

// body(image, block, first pixel, last pixel) for each block of each image, on all threads
template <typename Body>
void for_blocks(const Shape& shape, const Body& body) {
  const int64_t blocks = shape.blocks(), pixels = shape.pixels();
  in_parallel(shape.images * blocks, [&](int64_t task) {
    const int64_t image = task / blocks, block = task % blocks;
    body(image, block, block * pixels / blocks, (block + 1) * pixels / blocks);
  });
}

// body(maps...), pointers to the maps' values in their type
template <typename Body, typename... Maps>
void with_type(const Shape& shape, const Body& body, Maps*... maps) {
  if (shape.bfloat16)
    body(reinterpret_cast<BFloat16*>(maps)...);
  else
    body(reinterpret_cast<float*>(maps)...);
}

}  // namespace iaml
