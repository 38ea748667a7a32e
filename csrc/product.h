// The product of one projection within a call: compact the input, share the work, finish the sums.
#pragma once

#include <stdint.h>

#include <memory>
#include <new>

#include "instruction_set.h"

namespace teal {

// Memory that a thread keeps from call to call and that only grows.
template <class Element>
class Buffer {
 public:
  Element* reserve(int64_t count) {
    if (count > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(new Element[size_t(count)]);
      size_ = count;
    }
    return data_.get();
  }
  Element* get() const { return data_.get(); }

 private:
  std::unique_ptr<Element[]> data_;
  int64_t size_ = 0;
};

bool is_activation(int32_t format);
bool is_valid(const teal_projection& projection);

// Units of work are tiles times slices of the kept channels. Their number depends on the shape alone, and slices are
// added in order, so that any number of threads gives the same bits.
class Product {
 public:
  // `format` is that of bias and sparse bias. Throws std::bad_alloc.
  void prepare(const teal_projection& projection, int32_t format, int rows);

  // x [rows, row_stride] in float32: decides which channels are kept.
  void compact(const float* x, int64_t row_stride);
  int64_t units() const { return tiles_ * slices_; }
  // Each row's sums are those it has on its own: channels that only other rows keep are no part of it.
  void multiply(int64_t unit);
  // to = scale * sums + biases, outputs [begin, end) of a row.
  void finish(int row, int64_t begin, int64_t end, float* to) const;

 private:
  void multiply_alone(int row, const Tile& tile, const Kept& kept, float* sums) const;

  const teal_projection* projection_ = nullptr;
  int32_t format_ = 0;
  int rows_ = 0;
  int64_t tiles_ = 0, slices_ = 0, stride_ = 0, kept_ = 0;
  Buffer<int32_t> channels_;
  Buffer<float> values_, sums_;
};

// Whether a call is too small to be worth waking other threads.
bool is_little(const teal_weight& weight);

}  // namespace teal
