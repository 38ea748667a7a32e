#include "product.h"

#include <algorithm>

#include "team.h"

namespace teal {
namespace {

// Units of a projection: enough to balance a desktop's threads, but each adds its sums to the others'.
constexpr int64_t kLeastUnits = 16, kMostUnits = 32;
constexpr int64_t kUnitBytes = 2 << 20, kLeastUnitBytes = 512 << 10;  // of a dense unit
constexpr int64_t kLittleBytes = 256 << 10;

int64_t bits(int32_t format) {
  constexpr int64_t kBits[] = {32, 16, 16, 8, 4};
  return kBits[format];
}

int64_t run_bytes(const teal_weight& weight) { return weight.tile_outputs * bits(weight.format) / 8; }

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

void add_bias(int32_t format, const void* bias, int64_t begin, int64_t end, float* to) {
  const int64_t size = format == TEAL_FLOAT32 ? 4 : 2;
  float wide[256];
  for (int64_t i = begin; i < end; i += 256) {
    const int64_t count = std::min<int64_t>(256, end - i);
    chosen().widen(format, static_cast<const char*>(bias) + i * size, wide, count);
    for (int64_t k = 0; k < count; ++k) to[i - begin + k] += wide[k];
  }
}

bool has_nan(const float* x, int64_t count) {
  int found = 0;
  for (int64_t i = 0; i < count; ++i) found |= x[i] != x[i];
  return found != 0;
}

}  // namespace

bool is_activation(int32_t format) { return format >= TEAL_FLOAT32 && format <= TEAL_FLOAT16; }

bool is_valid(const teal_projection& projection) {
  const teal_weight& weight = projection.weight;
  if (weight.tiles == nullptr || projection.threshold == nullptr) return false;
  if (weight.format < TEAL_FLOAT32 || weight.format > TEAL_INT4) return false;
  if ((weight.format == TEAL_INT8 || weight.format == TEAL_INT4) && weight.scales == nullptr) return false;
  if (weight.outputs < 1 || weight.inputs < 1 || weight.inputs > INT32_MAX - 16 || weight.tile_outputs < 1) return false;
  return run_bytes(weight) * 8 == weight.tile_outputs * bits(weight.format) &&
         run_bytes(weight) % TEAL_LINE_BYTES == 0;
}

bool is_little(const teal_weight& weight) {
  return weight.outputs * weight.inputs * bits(weight.format) / 8 < kLittleBytes;
}

void Product::prepare(const teal_projection& projection, int32_t format, int rows) {
  const teal_weight& weight = projection.weight;
  projection_ = &projection;
  format_ = format;
  rows_ = rows;
  tiles_ = ceil_divide(weight.outputs, weight.tile_outputs);
  const int64_t tile_bytes = weight.inputs * run_bytes(weight);
  const int64_t units = std::clamp(tiles_ * tile_bytes / kUnitBytes, kLeastUnits, kMostUnits);
  slices_ = std::clamp<int64_t>(tile_bytes / kLeastUnitBytes, 1, ceil_divide(units, tiles_));
  stride_ = tiles_ * weight.tile_outputs;
  channels_.reserve(weight.inputs + 16);
  values_.reserve(weight.inputs * rows + 16);
  sums_.reserve(slices_ * rows * stride_);
}

void Product::compact(const float* x, int64_t row_stride) {
  const float* threshold = projection_->threshold;
  const int64_t step = projection_->threshold_stride, inputs = projection_->weight.inputs;
  int32_t* channels = channels_.get();
  float* values = values_.get();
  if (rows_ == 1) {
    kept_ = chosen().compact(x, threshold, step, inputs, channels, values);
    return;
  }
  kept_ = 0;
  for (int64_t channel = 0; channel < inputs; ++channel) {
    float* row_values = values + kept_ * rows_;
    bool any = false;
    for (int row = 0; row < rows_; ++row) {
      const float value = x[row * row_stride + channel];
      const bool keep = !(__builtin_fabsf(value) <= threshold[channel * step]);
      row_values[row] = keep ? value : 0.0f;
      any |= keep;
    }
    channels[kept_] = int32_t(channel);
    kept_ += any;
  }
}

void Product::multiply(int64_t unit) {
  const teal_weight& weight = projection_->weight;
  const int64_t tile = unit / slices_, slice = unit % slices_;
  const int64_t begin = kept_ * slice / slices_, end = kept_ * (slice + 1) / slices_;
  Tile part;
  part.run_bytes = run_bytes(weight);
  part.runs = static_cast<const uint8_t*>(weight.tiles) + tile * weight.inputs * part.run_bytes;
  part.outputs = std::min(weight.tile_outputs, weight.outputs - tile * weight.tile_outputs);
  part.tile_outputs = weight.tile_outputs;
  part.scales = nullptr;
  if (weight.format == TEAL_INT4) {
    const int64_t groups = ceil_divide(weight.inputs, TEAL_GROUP);
    part.scales = static_cast<const uint16_t*>(weight.scales) + tile * groups * weight.tile_outputs;
  }
  const Kept kept{channels_.get() + begin, values_.get() + begin * rows_, end - begin, kept_ - end};
  float* sums = sums_.get() + slice * rows_ * stride_ + tile * weight.tile_outputs;
  const InstructionSet& set = chosen();
  MultiplyTile kernel = format_ == TEAL_BFLOAT16 ? set.multiply_bfloat16[weight.format][rows_ - 1] : nullptr;
  if (kernel == nullptr) kernel = set.multiply[weight.format][rows_ - 1];
  kernel(part, kept, sums, stride_);
  for (int row = 0; rows_ > 1 && row < rows_; ++row)  // a zero times a weight that is not finite
    if (has_nan(sums + row * stride_, part.outputs)) multiply_alone(row, part, kept, sums + row * stride_);
}

// Threads may be out of memory here, where nothing can be thrown: then the row keeps its NaN.
void Product::multiply_alone(int row, const Tile& tile, const Kept& kept, float* sums) const {
  const std::unique_ptr<int32_t[]> channels(new (std::nothrow) int32_t[size_t(kept.count)]);
  const std::unique_ptr<float[]> values(new (std::nothrow) float[size_t(kept.count)]);
  if (!channels || !values) return;
  const float* threshold = projection_->threshold;
  int64_t count = 0;
  for (int64_t i = 0; i < kept.count; ++i) {
    const int32_t channel = kept.channels[i];
    const float value = kept.values[i * rows_ + row];
    if (__builtin_fabsf(value) <= threshold[channel * projection_->threshold_stride]) continue;
    channels[count] = channel;
    values[count++] = value;
  }
  chosen().multiply[projection_->weight.format][0](tile, Kept{channels.get(), values.get(), count, 0}, sums, stride_);
}

void Product::finish(int row, int64_t begin, int64_t end, float* to) const {
  const float* sums = sums_.get() + row * stride_;
  for (int64_t i = begin; i < end; ++i) to[i - begin] = sums[i];
  for (int64_t slice = 1; slice < slices_; ++slice) {
    const float* more = sums + slice * rows_ * stride_;
    for (int64_t i = begin; i < end; ++i) to[i - begin] += more[i];
  }
  if (projection_->weight.format == TEAL_INT8) {
    const float* scales = static_cast<const float*>(projection_->weight.scales);
    for (int64_t i = begin; i < end; ++i) to[i - begin] *= scales[i];
  }
  for (const void* bias : {projection_->bias, projection_->sparse_bias})
    if (bias != nullptr) add_bias(format_, bias, begin, end, to);
}

}  // namespace teal

namespace {

struct GemvMemory {
  teal::Product product;
  teal::Buffer<float> x, y;
};

void run_gemv(GemvMemory& memory, const teal_projection& projection, int32_t format, const void* x, int rows,
              int64_t row_stride, void* y) {
  using namespace teal;
  constexpr int64_t kChunk = 1024;
  const int64_t inputs = projection.weight.inputs, outputs = projection.weight.outputs;
  const int64_t size = format == TEAL_FLOAT32 ? 4 : 2, chunks = ceil_divide(outputs, kChunk);
  Product& product = memory.product;
  product.prepare(projection, format, rows);
  float* wide = memory.x.reserve(rows * inputs);
  float* result = memory.y.reserve(rows * outputs);
  for (int row = 0; row < rows; ++row)
    chosen().widen(format, static_cast<const char*>(x) + row * row_stride * size, wide + row * inputs, inputs);
  product.compact(wide, inputs);
  with_team(is_little(projection.weight), [&](Member& member) {
    member.share(product.units(), [&](int64_t unit) { product.multiply(unit); });
    member.share(rows * chunks, [&](int64_t task) {
      const int row = int(task / chunks);
      const int64_t begin = task % chunks * kChunk, end = std::min(outputs, begin + kChunk);
      const int64_t at = row * outputs + begin;
      product.finish(row, begin, end, result + at);
      chosen().narrow(format, result + at, static_cast<char*>(y) + at * size, end - begin);
    });
  });
}

}  // namespace

extern "C" int teal_sparse_gemv(const teal_projection* projection, int32_t format, const void* x, int64_t rows,
                                int64_t row_stride, void* y) {
  static thread_local GemvMemory memory;
  if (projection == nullptr || x == nullptr || y == nullptr || rows < 1 || rows > TEAL_MAX_ROWS)
    return TEAL_BAD_ARGUMENT;
  if (!teal::is_activation(format) || !teal::is_valid(*projection)) return TEAL_BAD_ARGUMENT;
  try {
    run_gemv(memory, *projection, format, x, int(rows), row_stride, y);
  } catch (const std::bad_alloc&) {
    return TEAL_OUT_OF_MEMORY;
  }
  return TEAL_OK;
}
