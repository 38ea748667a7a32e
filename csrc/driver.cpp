// Runs the kernels without Python on random shapes, against plain loops; made for address and undefined-behaviour
// sanitizers: weights, inputs and outputs are allocated to the byte. Exits 0 if all agree.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "teal.h"

namespace {

std::mt19937 generator(0);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
std::vector<float> floats(int64_t count, float value = 0) { return std::vector<float>(static_cast<size_t>(count), value); }
float normal() { return std::normal_distribution<float>()(generator); }

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return uint16_t(bits >> 16);
}
float from_bfloat16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// A weight in float32, bfloat16, int8 or int4, and what each element is.
struct Weight {
  std::vector<uint8_t> tiles;
  std::vector<float> scales;
  std::vector<uint16_t> group_scales;
  std::vector<float> values;  // [outputs, inputs]
  teal_weight native;

  Weight(int64_t outputs, int64_t inputs, int32_t format) {
    const int bits[] = {32, 16, 16, 8, 4};
    const int64_t line = TEAL_LINE_BYTES * 8 / bits[format];
    const int64_t size = line * between(1, 20), count = (outputs + size - 1) / size;
    const int64_t run = size * bits[format] / 8, groups = (inputs + TEAL_GROUP - 1) / TEAL_GROUP;
    tiles.resize(size_t(count * inputs * run));
    values.resize(size_t(outputs * inputs));
    scales.resize(size_t(outputs), 0.5f);
    group_scales.resize(size_t(count * groups * size), to_bfloat16(0.25f));
    for (int64_t output = 0; output < outputs; ++output)
      for (int64_t input = 0; input < inputs; ++input) {
        const int64_t tile = output / size, place = output % size;
        uint8_t* channel = tiles.data() + (tile * inputs + input) * run;
        float& value = values[size_t(output * inputs + input)];
        if (format == TEAL_FLOAT32) {
          value = normal();
          memcpy(channel + 4 * place, &value, 4);
        } else if (format == TEAL_BFLOAT16) {
          const uint16_t half = to_bfloat16(normal());
          memcpy(channel + 2 * place, &half, 2);
          value = from_bfloat16(half);
        } else if (format == TEAL_INT8) {
          const int8_t integer = int8_t(between(-127, 127));
          memcpy(channel + place, &integer, 1);
          value = 0.5f * float(integer);
        } else {
          const int integer = int(between(-7, 7));
          const int64_t within = place % 128, word = within % 16, nibble = within / 16;
          channel[place / 128 * 64 + word * 4 + nibble / 2] |= uint8_t((integer + 8) << nibble % 2 * 4);
          value = 0.25f * float(integer);
        }
      }
    const void* scale = format == TEAL_INT8 ? static_cast<void*>(scales.data())
                        : format == TEAL_INT4 ? static_cast<void*>(group_scales.data()) : nullptr;
    native = {tiles.data(), scale, outputs, inputs, size, format};
  }
};

bool check_product(int64_t outputs, int64_t inputs, int rows, int32_t format) {
  const Weight weight(outputs, inputs, format);
  const bool vector = between(0, 1);
  auto threshold = floats(vector ? inputs : 1), x = floats(rows * inputs), bias = floats(outputs);
  auto y = floats(rows * outputs, NAN);
  for (float& value : threshold) value = float(between(-1, 2)) * 0.5f;
  for (float& value : x) value = normal();
  for (float& value : bias) value = normal();
  const bool biased = between(0, 1);
  const teal_projection projection{weight.native, threshold.data(), vector, biased ? bias.data() : nullptr, nullptr};
  if (teal_sparse_gemv(&projection, TEAL_FLOAT32, x.data(), rows, inputs, y.data()) != TEAL_OK) return false;
  for (int row = 0; row < rows; ++row)
    for (int64_t output = 0; output < outputs; ++output) {
      double sum = biased ? double(bias[size_t(output)]) : 0, size = 1;
      for (int64_t input = 0; input < inputs; ++input) {
        const float value = x[size_t(row * inputs + input)];
        if (fabsf(value) <= threshold[size_t(vector ? input : 0)]) continue;
        const double product = double(value) * double(weight.values[size_t(output * inputs + input)]);
        sum += product;
        size += fabs(product);
      }
      if (!(fabs(sum - double(y[size_t(row * outputs + output)])) <= 1e-5 * size)) return false;
    }
  return true;
}

// That a step of two blocks runs within its memory and gives the same bits again.
bool check_step(int rows, int32_t format) {
  const int64_t kv_heads = between(1, 3), group = between(1, 3), dim = 2 * between(1, 20), hidden = between(1, 90);
  const int64_t inner = between(1, 150), positions = between(1, 600), heads = kv_heads * group;
  std::vector<std::unique_ptr<Weight>> weights;
  const float threshold = 0.3f;
  const auto projection = [&](int64_t outputs, int64_t inputs) {
    weights.push_back(std::make_unique<Weight>(outputs, inputs, format));
    return teal_projection{weights.back()->native, &threshold, 0, nullptr, nullptr};
  };
  const auto ones = floats(hidden > dim ? hidden : dim, 1.0f);
  std::vector<teal_block> blocks;
  for (int block = 0; block < 2; ++block) {
    teal_block b{};
    b.query = projection(heads * dim, hidden);
    b.key = projection(kv_heads * dim, hidden);
    b.value = projection(kv_heads * dim, hidden);
    b.output = projection(hidden, heads * dim);
    b.gate = projection(inner, hidden);
    b.up = projection(inner, hidden);
    b.down = projection(hidden, inner);
    b.input_norm = b.mlp_norm = ones.data();
    b.query_norm = b.key_norm = block ? ones.data() : nullptr;
    b.hidden = hidden, b.intermediate = inner, b.heads = heads, b.kv_heads = kv_heads, b.head_dim = dim;
    b.window = block ? between(0, 300) : 0;
    b.epsilon = 1e-5f, b.format = TEAL_FLOAT32;
    blocks.push_back(b);
  }
  const size_t cache = size_t(rows * kv_heads * positions * dim);
  auto x = floats(rows * hidden), cos = floats(rows * dim, 0.6f), sin = floats(rows * dim, 0.8f);
  std::vector<float> keys[2], values[2];
  for (float& value : x) value = normal();
  std::vector<int64_t> position(static_cast<size_t>(rows));
  for (int64_t& at : position) at = between(0, positions - 1);
  std::vector<float> out(x.size()), again(x.size());
  for (std::vector<float>* result : {&out, &again}) {
    void *key[2], *value[2];
    for (int block = 0; block < 2; ++block) {
      keys[block].assign(cache, 0.1f), values[block].assign(cache, 0.2f);
      key[block] = keys[block].data(), value[block] = values[block].data();
    }
    const teal_step step{rows, x.data(), result->data(), key, value, kv_heads * positions * dim, positions * dim, dim,
                         position.data(), cos.data(), sin.data(), nullptr};
    if (teal_decode_blocks(blocks.data(), 2, &step) != TEAL_OK) return false;
  }
  return memcmp(out.data(), again.data(), out.size() * sizeof(float)) == 0;
}

bool refuses_nonsense() {
  const Weight weight(3, 5, TEAL_FLOAT32);
  const float threshold = 0, x[5] = {};
  float y[3];
  teal_projection good{weight.native, &threshold, 0, nullptr, nullptr};
  const auto status = [&](const teal_projection& p, int32_t format, int64_t rows) {
    return teal_sparse_gemv(&p, format, x, rows, 5, y);
  };
  teal_projection odd = good, empty = good, narrow = good, unscaled = good, missing = good;
  odd.weight.format = 9, empty.weight.inputs = 0, narrow.weight.tile_outputs = 3, missing.weight.tiles = nullptr;
  unscaled.weight.format = TEAL_INT8;
  for (const teal_projection* bad : {&odd, &empty, &narrow, &unscaled, &missing})
    if (status(*bad, TEAL_FLOAT32, 1) != TEAL_BAD_ARGUMENT) return false;
  return status(good, TEAL_INT8, 1) == TEAL_BAD_ARGUMENT && status(good, TEAL_FLOAT32, 0) == TEAL_BAD_ARGUMENT &&
         status(good, TEAL_FLOAT32, 9) == TEAL_BAD_ARGUMENT && status(good, TEAL_FLOAT32, 1) == TEAL_OK &&
         teal_decode_blocks(nullptr, 1, nullptr) == TEAL_BAD_ARGUMENT &&
         teal_choose_instruction_set("none") == TEAL_UNKNOWN_NAME;
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? atoi(arguments[1]) : 200;
  const std::string names = teal_instruction_sets();
  for (size_t begin = 0; begin < names.size(); begin = names.find(' ', begin) + 1) {
    const std::string name = names.substr(begin, names.find(' ', begin) - begin);
    teal_choose_instruction_set(name.c_str());
    bool good = refuses_nonsense();
    for (int round = 0; good && round < rounds; ++round)
      for (int32_t format : {TEAL_FLOAT32, TEAL_BFLOAT16, TEAL_INT8, TEAL_INT4}) {
        good &= check_product(between(1, 700), between(1, 400), int(between(1, TEAL_MAX_ROWS)), format);
        good &= round % 10 != 0 || check_step(int(between(1, TEAL_MAX_ROWS)), format);
      }
    printf("%-12s %s\n", name.c_str(), good ? "agrees" : "DIFFERS");
    if (!good) return 1;
    if (names.find(' ', begin) == std::string::npos) break;
  }
  return 0;
}
