// Decoder blocks for one token per sequence, as one parallel region: its phases share work and meet at barriers.
#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <chrono>
#include <initializer_list>

#include "product.h"
#include "team.h"

namespace teal {
namespace {

constexpr int64_t kSpan = 256;     // positions that one attention task covers
constexpr int64_t kOutputs = 512;  // outputs that one finishing task covers

const char* const kPhases[] = {
    "input norm",   "compact q k v", "q k v",     "rotary and cache", "attention",    "combine heads", "compact o", "o",
    "residual, norm", "compact gate up", "gate up", "silu, product",  "compact down", "down",          "residual"};
constexpr int kPhaseCount = int(sizeof kPhases / sizeof *kPhases);
static_assert(kPhaseCount <= TEAL_PHASES, "");

// Everything a block computes with, kept by the calling thread.
struct Memory {
  Product query, key, value, output, gate, up, down;
  Buffer<float> residual, x, q, k, cos, sin, attended, gated, partial, scratch;
};

class DecodeStep {
 public:
  // Throws std::bad_alloc; afterwards nothing is allocated.
  DecodeStep(Memory& memory, const teal_block* blocks, int64_t count, const teal_step& step)
      : m_(memory), blocks_(blocks), count_(count), b_(*blocks), s_(step), set_(chosen()), rows_(int(step.rows)) {
    group_ = b_.heads / b_.kv_heads;
    element_ = b_.format == TEAL_FLOAT32 ? 4 : 2;
    int64_t longest = 1;
    for (int row = 0; row < rows_; ++row) longest = std::max(longest, s_.positions[row] + 1);
    spans_ = (longest + kSpan - 1) / kSpan;
    for (int64_t block = 0; block < count; ++block) prepare(block);
    const int64_t query = b_.heads * b_.head_dim, heads = rows_ * b_.heads;
    m_.residual.reserve(rows_ * b_.hidden);
    m_.x.reserve(rows_ * b_.hidden);
    m_.q.reserve(rows_ * query);
    m_.k.reserve(rows_ * b_.kv_heads * b_.head_dim);
    m_.cos.reserve(rows_ * b_.head_dim);
    m_.sin.reserve(rows_ * b_.head_dim);
    m_.attended.reserve(rows_ * query);
    m_.gated.reserve(2 * rows_ * b_.intermediate);
    m_.partial.reserve(heads * spans_ * (b_.head_dim + 2));
    m_.scratch.reserve(rows_ * b_.kv_heads * spans_ * (b_.head_dim + group_ * kSpan));
  }

  void run(Member& member) {
    member.share(rows_, [&](int64_t row) { load(int(row)); });
    for (int64_t block = 0; block < count_; ++block) run_block(member, block);
    member.share(rows_, [&](int64_t row) { store(int(row)); });
  }

 private:
  using Products = std::initializer_list<Product*>;

  void prepare(int64_t block) {
    const teal_block& b = blocks_[block];
    at_ = block;
    b_ = b;
    m_.query.prepare(b.query, b.format, rows_);
    m_.key.prepare(b.key, b.format, rows_);
    m_.value.prepare(b.value, b.format, rows_);
    m_.output.prepare(b.output, b.format, rows_);
    m_.gate.prepare(b.gate, b.format, rows_);
    m_.up.prepare(b.up, b.format, rows_);
    m_.down.prepare(b.down, b.format, rows_);
  }

  void run_block(Member& member, int64_t block) {
    int phase = 0;
    const auto share = [&](int64_t count, auto task) {
      member.share(count, task);
      if (s_.phase_seconds != nullptr && member.first()) add_seconds(phase++);
    };
    share(1, [&](int64_t) {
      prepare(block);
      for (int row = 0; row < rows_; ++row) norm(row, b_.input_norm);
    });
    const int64_t kv_tasks = rows_ * b_.kv_heads;
    compact(share, m_.x.get(), b_.hidden, {&m_.query, &m_.key, &m_.value});
    multiply(share, {&m_.query, &m_.key, &m_.value});
    share(kv_tasks, [&](int64_t task) { rotate_and_store(task / b_.kv_heads, task % b_.kv_heads); });
    share(kv_tasks * spans_, [&](int64_t task) {
      attend(task / spans_ / b_.kv_heads, task / spans_ % b_.kv_heads, task % spans_, task);
    });
    share(rows_ * b_.heads, [&](int64_t task) { combine(task); });
    compact(share, m_.attended.get(), b_.heads * b_.head_dim, {&m_.output});
    multiply(share, {&m_.output});
    share(rows_, [&](int64_t row) {
      add(m_.output, int(row));
      norm(int(row), b_.mlp_norm);
    });
    compact(share, m_.x.get(), b_.hidden, {&m_.gate, &m_.up});
    multiply(share, {&m_.gate, &m_.up});
    const int64_t chunks = (b_.intermediate + kOutputs - 1) / kOutputs;
    share(rows_ * chunks, [&](int64_t task) { gate(int(task / chunks), task % chunks * kOutputs); });
    compact(share, m_.gated.get(), b_.intermediate, {&m_.down});
    multiply(share, {&m_.down});
    share(rows_, [&](int64_t row) { add(m_.down, int(row)); });
  }

  template <class Share>
  static void compact(Share share, const float* x, int64_t row_stride, Products products) {
    share(int64_t(products.size()), [=](int64_t i) { products.begin()[i]->compact(x, row_stride); });
  }

  template <class Share>
  static void multiply(Share share, Products products) {
    int64_t units = 0;
    for (const Product* product : products) units += product->units();
    share(units, [=](int64_t unit) {
      for (Product* product : products) {
        if (unit < product->units()) return product->multiply(unit);
        unit -= product->units();
      }
    });
  }

  void add_seconds(int phase) {
    const auto now = std::chrono::steady_clock::now();
    s_.phase_seconds[phase] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  void load(int row) {
    const int64_t at = row * b_.head_dim;
    set_.widen(b_.format, static_cast<const char*>(s_.cos) + at * element_, m_.cos.get() + at, b_.head_dim);
    set_.widen(b_.format, static_cast<const char*>(s_.sin) + at * element_, m_.sin.get() + at, b_.head_dim);
    set_.widen(b_.format, static_cast<const char*>(s_.hidden) + row * b_.hidden * element_,
               m_.residual.get() + row * b_.hidden, b_.hidden);
  }

  void store(int row) {
    set_.narrow(b_.format, m_.residual.get() + row * b_.hidden,
                static_cast<char*>(s_.out) + row * b_.hidden * element_, b_.hidden);
  }

  void norm(int row, const void* weight) {
    const int64_t at = row * b_.hidden;
    set_.rms_norm(b_.format, m_.residual.get() + at, weight, b_.epsilon, m_.x.get() + at, b_.hidden);
  }

  // The rotary embedding of one head, after its norm if the model has one.
  void rotate(const void* norm, int64_t row, float* head) {
    const int64_t dim = b_.head_dim, half = dim / 2;
    const float *cos = m_.cos.get() + row * dim, *sin = m_.sin.get() + row * dim;
    set_.round(b_.format, head, dim);
    if (norm != nullptr) set_.rms_norm(b_.format, head, norm, b_.epsilon, head, dim);
    for (int64_t i = 0; i < half; ++i) {
      const float low = head[i], high = head[i + half];
      head[i] = low * cos[i] - high * sin[i];
      head[i + half] = high * cos[i + half] + low * sin[i + half];
    }
    set_.round(b_.format, head, dim);
  }

  char* cached(void* cache, int64_t row, int64_t kv_head, int64_t position) {
    return static_cast<char*>(cache) +
           (row * s_.sequence_stride + kv_head * s_.head_stride + position * s_.position_stride) * element_;
  }

  void rotate_and_store(int64_t row, int64_t kv_head) {
    const int64_t dim = b_.head_dim, position = s_.positions[row], width = group_ * dim;
    float* q = m_.q.get() + row * b_.heads * dim + kv_head * width;
    m_.query.finish(int(row), kv_head * width, (kv_head + 1) * width, q);
    for (int64_t head = 0; head < group_; ++head) rotate(b_.query_norm, row, q + head * dim);
    float* k = m_.k.get() + (row * b_.kv_heads + kv_head) * dim;
    m_.key.finish(int(row), kv_head * dim, (kv_head + 1) * dim, k);
    rotate(b_.key_norm, row, k);
    set_.narrow(b_.format, k, cached(s_.keys[at_], row, kv_head, position), dim);
    m_.value.finish(int(row), kv_head * dim, (kv_head + 1) * dim, k);
    set_.narrow(b_.format, k, cached(s_.values[at_], row, kv_head, position), dim);
  }

  int64_t first_seen(int64_t row) const {
    return b_.window > 0 ? std::max<int64_t>(0, s_.positions[row] + 1 - b_.window) : 0;
  }

  // One KV head over one span of positions: for each of its query heads the largest score, the sum of exponentials
  // relative to it and the values weighted with them.
  void attend(int64_t row, int64_t kv_head, int64_t span, int64_t task) {
    const int64_t dim = b_.head_dim, first = first_seen(row) + span * kSpan;
    const int64_t count = std::max<int64_t>(0, std::min(kSpan, s_.positions[row] + 1 - first));
    float* buffer = m_.scratch.get() + task * (dim + group_ * kSpan);
    float* scores = buffer + dim;
    const float scale = 1.0f / sqrtf(float(dim));
    const float* q = m_.q.get() + (row * b_.heads + kv_head * group_) * dim;
    for (int64_t i = 0; i < count; ++i) {
      set_.widen(b_.format, cached(s_.keys[at_], row, kv_head, first + i), buffer, dim);
      for (int64_t head = 0; head < group_; ++head)
        scores[head * kSpan + i] = scale * set_.dot(q + head * dim, buffer, dim);
    }
    for (int64_t head = 0; head < group_; ++head) {
      float* part = partial(row, kv_head * group_ + head, span);
      float* weights = scores + head * kSpan;
      part[0] = -INFINITY;
      part[1] = 0;
      std::fill(part + 2, part + 2 + dim, 0.0f);
      for (int64_t i = 0; i < count; ++i) part[0] = weights[i] > part[0] ? weights[i] : part[0];
      if (count > 0) set_.exponentials(weights, part[0], count);
      for (int64_t i = 0; i < count; ++i) part[1] += weights[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      set_.widen(b_.format, cached(s_.values[at_], row, kv_head, first + i), buffer, dim);
      for (int64_t head = 0; head < group_; ++head)
        set_.add_scaled(buffer, scores[head * kSpan + i], partial(row, kv_head * group_ + head, span) + 2, dim);
    }
  }

  float* partial(int64_t row, int64_t head, int64_t span) {
    return m_.partial.get() + ((row * b_.heads + head) * spans_ + span) * (b_.head_dim + 2);
  }

  void combine(int64_t task) {
    const int64_t row = task / b_.heads, head = task % b_.heads, dim = b_.head_dim;
    float* to = m_.attended.get() + task * dim;
    float largest = -INFINITY, sum = 0;
    for (int64_t span = 0; span < spans_; ++span) largest = std::max(largest, partial(row, head, span)[0]);
    std::fill(to, to + dim, 0.0f);
    for (int64_t span = 0; span < spans_; ++span) {
      const float* part = partial(row, head, span);
      const float weight = part[0] == -INFINITY ? 0.0f : expf(part[0] - largest);
      sum += weight * part[1];
      set_.add_scaled(part + 2, weight, to, dim);
    }
    for (int64_t i = 0; i < dim; ++i) to[i] /= sum;
    set_.round(b_.format, to, dim);
  }

  void add(const Product& product, int row) {
    float* residual = m_.residual.get() + row * b_.hidden;
    float* sum = m_.x.get() + row * b_.hidden;
    product.finish(row, 0, b_.hidden, sum);
    set_.add_scaled(sum, 1.0f, residual, b_.hidden);
    set_.round(b_.format, residual, b_.hidden);
  }

  void gate(int row, int64_t begin) {
    const int64_t count = std::min(kOutputs, b_.intermediate - begin);
    float* gate = m_.gated.get() + row * b_.intermediate + begin;
    float* up = gate + rows_ * b_.intermediate;
    m_.gate.finish(row, begin, begin + count, gate);
    m_.up.finish(row, begin, begin + count, up);
    set_.gated(gate, up, gate, count);
    set_.round(b_.format, gate, count);
  }

  Memory& m_;
  const teal_block* const blocks_;
  const int64_t count_;
  teal_block b_;  // the block under way, and its index
  int64_t at_ = 0;
  const teal_step& s_;
  const InstructionSet& set_;
  const int rows_;
  int64_t group_, element_, spans_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

bool has_shape(const teal_projection& projection, int64_t outputs, int64_t inputs) {
  return is_valid(projection) && projection.weight.outputs == outputs && projection.weight.inputs == inputs;
}

bool is_valid_block(const teal_block& b) {
  if (!is_activation(b.format) || b.heads < 1 || b.kv_heads < 1 || b.heads % b.kv_heads != 0) return false;
  if (b.head_dim < 2 || b.head_dim % 2 != 0 || b.window < 0 || !b.input_norm || !b.mlp_norm) return false;
  const int64_t query = b.heads * b.head_dim, key = b.kv_heads * b.head_dim;
  return has_shape(b.query, query, b.hidden) && has_shape(b.key, key, b.hidden) &&
         has_shape(b.value, key, b.hidden) && has_shape(b.output, b.hidden, query) &&
         has_shape(b.gate, b.intermediate, b.hidden) && has_shape(b.up, b.intermediate, b.hidden) &&
         has_shape(b.down, b.hidden, b.intermediate);
}

bool is_alike(const teal_block& a, const teal_block& b) {
  return a.hidden == b.hidden && a.intermediate == b.intermediate && a.heads == b.heads && a.kv_heads == b.kv_heads &&
         a.head_dim == b.head_dim && a.format == b.format;
}

bool is_valid_step(const teal_step& s) {
  if (s.rows < 1 || s.rows > TEAL_MAX_ROWS) return false;
  if (!s.hidden || !s.out || !s.keys || !s.values || !s.positions || !s.cos || !s.sin) return false;
  for (int64_t row = 0; row < s.rows; ++row)
    if (s.positions[row] < 0) return false;
  return true;
}

}  // namespace
}  // namespace teal

extern "C" {

int teal_decode_blocks(const teal_block* blocks, int64_t count, const teal_step* step) {
  static thread_local teal::Memory memory;
  if (blocks == nullptr || count < 1 || step == nullptr || !teal::is_valid_step(*step)) return TEAL_BAD_ARGUMENT;
  for (int64_t block = 0; block < count; ++block)
    if (!teal::is_valid_block(blocks[block]) || !teal::is_alike(blocks[block], *blocks) || !step->keys[block] ||
        !step->values[block])
      return TEAL_BAD_ARGUMENT;
  try {
    teal::DecodeStep run(memory, blocks, count, *step);
    teal::with_team(teal::is_little(blocks->gate.weight), [&](teal::Member& member) { run.run(member); });
  } catch (const std::bad_alloc&) {
    return TEAL_OUT_OF_MEMORY;
  }
  return TEAL_OK;
}

const char* teal_phase_name(int phase) {
  return phase >= 0 && phase < teal::kPhaseCount ? teal::kPhases[phase] : nullptr;
}

}  // extern "C"
