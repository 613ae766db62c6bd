// Drives the kernels over random models, steps and draws, for a build with AddressSanitizer and UBSan.
//
// Every array that the kernels are given is a heap allocation of exactly its size, so that a read or write one
// byte beyond it is seen. The cache starts full of NaN. Each step's logits are compared, bit for bit, with those of
// the sequence alone in one chunk.
//
//   harness            all shapes; prints a line for each and "clean" last
//   harness overrun    one step with logits one float too short: must not survive
#include <stdio.h>

#include <deque>
#include <random>
#include <string>

#include "engine.cpp"

namespace {

std::mt19937 generator(1);

int draw(int low, int high) { return low + (int)(generator() % (uint32_t)(high - low + 1)); }  // both ends included

// `count` values of T, on the heap and not one byte more.
template <class T>
class Exact {
 public:
  explicit Exact(size_t count) : count_(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(T))) abort();
    data_ = (T*)memory;
  }
  Exact(Exact&& other) : data_(other.data_), count_(other.count_) { other.data_ = nullptr; }
  ~Exact() { free(data_); }
  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
  size_t count_;
};

struct Shape {
  const char* name;
  int layers, hidden, inner, heads, kv_heads, head_dim, vocab, block_size, kind, threads, max_rows;
  bool has_bias, has_head_norm, is_tied;
};

const Shape kShapes[] = {
    {"llama, pairs", 2, 64, 96, 6, 2, 64, 101, 16, ZS_Q4_HALF, 2, 160, false, false, true},
    {"llama, odd blocks", 1, 32, 32, 4, 1, 80, 33, 5, ZS_Q8_HALF, 1, 70, false, false, false},
    {"qwen2, bias", 1, 96, 64, 14, 2, 64, 64, 32, ZS_Q4_FLOAT, 2, 97, true, false, false},
    {"qwen3, head norm", 1, 64, 64, 16, 2, 128, 31, 1, ZS_Q8_SPLIT, 2, 90, false, true, true},
    {"mistral, wide blocks", 1, 64, 32, 2, 2, 96, 130, 48, ZS_Q8_HALF, 1, 200, false, false, false},
    {"llama, blocks of a tile", 1, 32, 64, 8, 1, 64, 96, 128, ZS_Q4_HALF, 2, 130, false, false, false},
};

class Model {
 public:
  explicit Model(const Shape& s) : shape_(s), layers_(s.layers) {
    const int query = s.heads * s.head_dim, key = s.kv_heads * s.head_dim;
    for (int i = 0; i < s.layers; i++) {
      ZsLayer& layer = layers_[i];
      layer = {};
      layer.input_norm = floats(s.hidden, 1.0f);
      layer.mlp_norm = floats(s.hidden, 1.0f);
      if (s.has_bias) {
        layer.q_bias = floats(query, 0.0f);
        layer.k_bias = floats(key, 0.0f);
        layer.v_bias = floats(key, 0.0f);
      }
      if (s.has_head_norm) {
        layer.q_norm = floats(s.head_dim, 1.0f);
        layer.k_norm = floats(s.head_dim, 1.0f);
      }
      layer.q = matrix(query, s.hidden);
      layer.k = matrix(key, s.hidden);
      layer.v = matrix(key, s.hidden);
      layer.output = matrix(s.hidden, query);
      layer.gate_up = matrix(2 * s.inner, s.hidden);
      layer.down = matrix(s.hidden, s.inner);
    }
    model.num_layers = s.layers;
    model.hidden_size = s.hidden;
    model.intermediate_size = s.inner;
    model.num_heads = s.heads;
    model.num_kv_heads = s.kv_heads;
    model.head_dim = s.head_dim;
    model.vocab_size = s.vocab;
    model.block_size = s.block_size;
    model.rms_norm_eps = 1e-5f;
    float* frequencies = floats(s.head_dim / 2, 0.0f);
    for (int i = 0; i < s.head_dim / 2; i++) frequencies[i] = powf(1e4f, -2.0f * (float)i / (float)s.head_dim);
    model.inverse_frequencies = frequencies;
    model.final_norm = floats(s.hidden, 1.0f);
    model.embedding = matrix(s.vocab, s.hidden);
    model.head = s.is_tied ? model.embedding : matrix(s.vocab, s.hidden);
    model.layers = layers_.data();
  }

  ZsModel model = {};

 private:
  float* floats(int count, float centre) {
    floats_.emplace_back(count);
    for (int i = 0; i < count; i++) floats_.back()[i] = centre + (float)draw(-100, 100) * 0.004f;
    return floats_.back().data();
  }

  // Random codes; scales that make a weight's magnitude about 1 / sqrt(columns).
  ZsMatrix matrix(int rows, int columns) {
    const int kind = shape_.kind;
    const int64_t tile_size = zs_tile_bytes(kind);
    const size_t tiles = (size_t)(rows + 31) / 32 * (columns / 32);
    tiles_.emplace_back(tiles * tile_size);
    const bool is_4_bit = kind == ZS_Q4_HALF || kind == ZS_Q4_FLOAT;
    for (size_t t = 0; t < tiles; t++) {
      uint8_t* tile = tiles_.back().data() + t * tile_size;
      const int codes = is_4_bit ? 512 : 1024;
      for (int i = 0; i < codes; i++) tile[i] = (uint8_t)draw(is_4_bit || kind == ZS_Q8_SPLIT ? 0 : 1, 255);
      const float step = 1.0f / sqrtf((float)columns) / (is_4_bit ? 4.6f : 74.0f);
      for (int n = 0; n < 32; n++) {
        const float scale = step * (float)draw(50, 150) * 0.01f, minimum = -7.5f * scale;
        if (kind == ZS_Q4_HALF || kind == ZS_Q8_HALF) {
          put_half(tile + codes + 2 * n, scale);
          if (is_4_bit) put_half(tile + codes + 64 + 2 * n, minimum);
        } else {
          memcpy(tile + codes + 4 * n, &scale, 4);
          memcpy(tile + codes + 128 + 4 * n, is_4_bit ? &minimum : &scale, 4);
        }
      }
    }
    return {tiles_.back().data(), rows, columns, kind, 0};
  }

  static void put_half(uint8_t* at, float value) {  // normal numbers; the lowest bits are cut off
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t half = (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)(((bits & 0x7fffffff) - 0x38000000) >> 13);
    memcpy(at, &half, 2);
  }

  const Shape& shape_;
  Exact<ZsLayer> layers_;
  std::deque<Exact<float>> floats_;
  std::deque<Exact<uint8_t>> tiles_;
};

struct Sequence {
  std::vector<int> tokens, blocks;
  int computed = 0;
};

// A chunk to compute: `count` tokens of a sequence from `start` on.
struct Piece {
  const Sequence* sequence;
  int start, count;
  bool samples;
};

class Run {
 public:
  Run(const Shape& shape, int logits_short_by)
      : shape_(shape), model_(shape), logits_short_by_(logits_short_by),
        block_elements_((size_t)shape.kv_heads * shape.layers * 2 * shape.block_size * shape.head_dim),
        kv_(kNumSequences * 2 * blocks_for(kMaxTokens) * block_elements_) {
    const int num_blocks = (int)(kv_.size() / block_elements_);
    memset(kv_.data(), 0xff, kv_.size() * sizeof(uint16_t));
    for (int i = 0; i < num_blocks; i++) free_.push_back(i);
    std::shuffle(free_.begin(), free_.end(), generator);
    engine_ = zs_create(&model_.model, kv_.data(), shape.max_rows, shape.threads);
    alone_ = zs_create(&model_.model, kv_.data(), kMaxTokens, 1);
    if (!engine_ || !alone_) abort();
  }
  ~Run() {
    zs_destroy(engine_);
    zs_destroy(alone_);
  }

  // Returns how many rows were compared.
  int walk() {
    std::vector<Sequence> sequences;
    for (int i = 0; i < kNumSequences; i++) sequences.push_back(sequence(i == 0 ? kMaxTokens : draw(1, kMaxTokens / 3)));
    int compared = 0;
    while (true) {
      std::vector<Piece> pieces;
      int room = shape_.max_rows;
      for (Sequence& s : sequences) {
        const int left = (int)s.tokens.size() - s.computed;
        if (!left || !room || draw(0, 3) == 0) continue;
        const int count = std::min({left, room, draw(0, 1) ? 1 : draw(1, shape_.max_rows)});
        pieces.push_back({&s, s.computed, count, draw(0, 2) > 0});
        room -= count;
      }
      if (pieces.empty()) {
        if (std::all_of(sequences.begin(), sequences.end(), [](const Sequence& s) { return s.computed == (int)s.tokens.size(); })) break;
        continue;
      }
      Exact<float> logits = step(engine_, pieces);
      for (const Piece& piece : pieces) const_cast<Sequence*>(piece.sequence)->computed += piece.count;
      size_t row = 0;
      for (const Piece& piece : pieces) {
        if (!piece.samples) continue;
        if (draw(0, 2) == 0 || !compared) compared += compare(piece, logits.data() + row * shape_.vocab);
        row++;
      }
    }
    zs_scrub(engine_);
    return compared;
  }

 private:
  static constexpr int kNumSequences = 4, kMaxTokens = 300;

  int blocks_for(int tokens) const { return (tokens + shape_.block_size - 1) / shape_.block_size; }

  Sequence sequence(int length) {
    Sequence s;
    for (int i = 0; i < length; i++) s.tokens.push_back(draw(0, shape_.vocab - 1));
    for (int i = 0; i < blocks_for(length); i++) {
      s.blocks.push_back(free_.back());
      free_.pop_back();
    }
    return s;
  }

  // The row of the piece's last token again, from the first token on, over blocks of its own.
  int compare(const Piece& piece, const float* row) {
    Sequence again;
    again.tokens.assign(piece.sequence->tokens.begin(), piece.sequence->tokens.begin() + piece.start + piece.count);
    again.blocks.assign(free_.end() - blocks_for((int)again.tokens.size()), free_.end());
    Exact<float> logits = step(alone_, {{&again, 0, (int)again.tokens.size(), true}});
    if (memcmp(logits.data(), row, shape_.vocab * sizeof(float))) {
      printf("%s: the row after %zu tokens is not what it is alone\n", shape_.name, again.tokens.size());
      exit(1);
    }
    for (int i = 0; i < shape_.vocab; i++)
      if (!(fabsf(row[i]) < 1e4f)) {
        printf("%s: logit %d after %zu tokens is %g\n", shape_.name, i, again.tokens.size(), (double)row[i]);
        exit(1);
      }
    return 1;
  }

  Exact<float> step(void* engine, const std::vector<Piece>& pieces) {
    int rows = 0, table_size = 0, samples = 0;
    for (const Piece& piece : pieces) {
      rows += piece.count;
      table_size += blocks_for(piece.start + piece.count);
      samples += piece.samples;
    }
    Exact<int32_t> token_ids(rows), tables(table_size), sampled(samples);
    Exact<ZsChunk> chunks(pieces.size());
    int row = 0, entry = 0, sample = 0;
    for (size_t c = 0; c < pieces.size(); c++) {
      const Piece& piece = pieces[c];
      chunks[c] = {row, piece.count, piece.start, entry};
      for (int i = 0; i < blocks_for(piece.start + piece.count); i++) tables[entry++] = piece.sequence->blocks[i];
      for (int i = 0; i < piece.count; i++) token_ids[row++] = piece.sequence->tokens[piece.start + i];
      if (piece.samples) sampled[sample++] = row - 1;
    }
    Exact<float> logits((size_t)samples * shape_.vocab - (samples ? logits_short_by_ : 0));
    const ZsStep step{rows, (int)pieces.size(), samples, 0, token_ids.data(), chunks.data(), tables.data(), sampled.data(), logits.data()};
    zs_step(engine, &step);
    return logits;
  }

  const Shape& shape_;
  Model model_;
  const int logits_short_by_;
  const size_t block_elements_;
  Exact<uint16_t> kv_;
  std::vector<int> free_;
  void* engine_ = nullptr;
  void* alone_ = nullptr;
};

// Draws from random rows: ties, masks, NaN and infinities among them.
int draw_tokens() {
  const int sizes[] = {1, 2, 31, 32, 33, 63, 64, 65, 101, 1000};
  int drawn = 0;
  for (int round = 0; round < 400; round++) {
    const int n = sizes[round % 10], words = (n + 31) / 32, kind = draw(0, 9);
    Exact<float> row(n);
    Exact<uint32_t> mask(words);
    Exact<int32_t> ids(draw(1, n));
    Exact<uint8_t> scratch(zs_sampling_scratch_bytes(n));
    for (int i = 0; i < n; i++) row[i] = (float)draw(-300, 300) * (kind % 2 ? 0.05f : 0.5f);
    for (int i = 0; i < words; i++) mask[i] = generator() & generator();
    if (kind == 0) row[draw(0, n - 1)] = NAN;
    if (kind == 1) row[draw(0, n - 1)] = INFINITY;
    if (kind > 6)
      for (int i = 0; i < n; i++)
        if (draw(0, 1)) row[i] = -INFINITY;
    const bool is_masked = draw(0, 1), is_cold = draw(0, 3) == 0;
    const double min_offset = draw(0, 1) ? -INFINITY : -0.1 * draw(0, 40), top_p = draw(0, 1) ? 1.0 : 0.01 * draw(1, 100);
    const int token = zs_choose(row.data(), is_masked ? mask.data() : nullptr, n, is_cold ? 0.0 : 0.1 * draw(1, 30),
                                draw(0, 1) ? 0 : draw(1, n), min_offset, top_p, draw(0, 999) * 0.001, scratch.data());
    if (token >= n || (token >= 0 && (row[token] == -INFINITY || (is_masked && !(mask[token / 32] >> token % 32 & 1))))) {
      printf("%d of %d was drawn and may not be\n", token, n);
      exit(1);
    }
    zs_likelihoods(row.data(), n, (int)ids.size(), ids.data(), scratch.data());
    drawn += token >= 0;
  }
  return drawn;
}

}  // namespace

int main(int argc, char** argv) {
  const bool is_overrun = argc > 1 && std::string(argv[1]) == "overrun";
  for (const Shape& shape : kShapes) {
    const int compared = Run(shape, is_overrun ? 1 : 0).walk();
    printf("%s: %s, %d rows compared\n", zs_path(), shape.name, compared);
    if (!compared) return 1;
  }
  printf("%s: sampling, %d tokens drawn\n", zs_path(), draw_tokens());
  printf("clean\n");
}
