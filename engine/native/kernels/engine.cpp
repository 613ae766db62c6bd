// The whole step of a decoder: token ids in, logits and KV out, in one parallel region.
//
// A step with few rows is narrow: the threads share every matrix, and wait for one another after each. In a wide one
// they share the rows: a thread takes a block of them through everything but attention alone. Which of the two it is
// changes who computes a number, never the number.
#include <omp.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "abi.h"
#include "attention.h"
#include "gemm.h"
#include "sampling.h"
#include "simd.h"
#include "team.h"

namespace zs {

constexpr int kBlockRows = 96;          // rows that are taken through a layer at once
constexpr int kItemsPerThread = 4;      // into so many pieces for each thread a narrow step's work is cut
constexpr int kWideRowsPerThread = 32;  // from this many rows a thread on, a step is wide
constexpr int kTasksPerThread = 4;      // fewer decode tasks than this: contexts are split into tiles
constexpr int kMaxSplitTiles = 256;     // a longer context is not split
constexpr int kRepeatedRows = 1;        // up to so many decodes, what is cheap is computed by each thread for itself

// Rounding to 8 bits shows most in what attention and the head read; 16 bits there cost a tenth of the products and
// make the whole model as true to float32 as bfloat16 arithmetic is (DECISIONS.md has the figures).
using AttentionInput = FineGroup;
using HeadInput = FineGroup;
#if defined(ZS_PATH_PORTABLE)
using MlpInput = FineGroup;  // without 8-bit instructions a second product costs little more than the first
#else
using MlpInput = Group;
#endif

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// A piece of attention: rows of one chunk against the keys of one KV head.
struct Task {
  int chunk;
  int first_row, num_rows;  // of the step
  int head;                 // KV head
  int tile;                 // -1: all tiles in turn; else only this one, its result kept apart
  int partial;              // index of the first kept result of these rows
  int64_t cost;
};

// Memory of one thread.
struct Workspace {
  float* qkv;          // (kBlockRows, qkv_stride)
  float* staged;       // (kBlockRows, 32) one group of the MLP's inner activations
  uint16_t* query;     // (kMaxQueryRows, D)
  uint16_t* keys;      // (kTileKeys, D) a gathered tile
  uint16_t* values;
  float* peak;         // (kMaxQueryRows + 16)
  float* sum;
  float* run_values;   // (kMaxQueryRows, D)
  float* tile_values;  // (kAttendRows, D)
  float* normed;       // (H)
  AttentionInput* attention_groups;  // (kRepeatedRows, H / 32), and so on: of a repeating step
  MlpInput* mlp_groups;
  float* attended;     // (kRepeatedRows, Q)
  Group* attended_groups;
};

class Engine {
 public:
  Engine(const ZsModel& model, uint16_t* kv, int max_rows, int num_threads)
      : model_(model), layers_(model.layers, model.layers + model.num_layers), kv_(kv), max_rows_(max_rows),
        num_threads_(num_threads), parts_((model.num_layers + 1) * most_blocks() * kNumParts) {
    query_size_ = model.num_heads * model.head_dim;
    kv_size_ = model.num_kv_heads * model.head_dim;
    heads_per_group_ = model.num_heads / model.num_kv_heads;
    qkv_stride_ = round_up(query_size_, kTileSize) + 2 * round_up(kv_size_, kTileSize);
    has_pairs_ = model.block_size % kLanes == 0;
    exponent_scale_ = 1.4426950408889634f / sqrtf((float)model.head_dim);
  }
  ~Engine() { free(memory_); }

  static bool supports(const ZsModel& m, int max_rows, int num_threads) {
    const int query = m.num_heads * m.head_dim;
    return max_rows > 0 && num_threads > 0 && m.num_layers > 0 && m.block_size > 0 && m.hidden_size % kTileSize == 0 &&
           m.intermediate_size % kTileSize == 0 && query % kTileSize == 0 && m.head_dim % kLanes == 0 && m.head_dim <= kMaxHeadDim &&
           m.num_heads % m.num_kv_heads == 0 && m.num_heads / m.num_kv_heads <= kMaxQueryRows;
  }

  bool allocate() {
    lay_out();  // once without memory, for its size
    memory_ = (uint8_t*)aligned_alloc(64, memory_bytes_);
    if (!memory_) return false;
    memset(memory_, 0, memory_bytes_);
    lay_out();
    tasks_.reserve((size_t)max_rows_ * model_.num_kv_heads + (size_t)split_rows() * kMaxSplitTiles);
    merges_.reserve(split_rows());
    return true;
  }

  int64_t scratch_bytes() const { return memory_bytes_ + (int64_t)(tasks_.capacity() * sizeof(Task) + merges_.capacity() * sizeof(int) + parts_.size() * sizeof(Part)); }

  // Zeroes what steps have left in memory since the last call.
  void scrub() {
    for (const RowArray& array : row_arrays_) memset(memory_ + array.offset, 0, array.row_bytes * dirty_rows_);
    memset(memory_ + workspace_offset_, 0, (has_partials_ ? memory_bytes_ : partial_offset_) - workspace_offset_);
    dirty_rows_ = 0;
    has_partials_ = false;
  }

  void step(const ZsStep& step) {
    step_ = &step;
    plan_attention();
    dirty_rows_ = std::max(dirty_rows_, step.num_rows);
    has_partials_ |= !merges_.empty();
    for (size_t i = 0; i < (size_t)(model_.num_layers + 1) * num_blocks() * kNumParts; i++) parts_[i].reset();
#pragma omp parallel num_threads(num_threads_)
    run(omp_get_thread_num(), omp_get_num_threads());
  }

 private:
  // What threads do together, in the order of a layer. A wide step knows kRows and kAttend alone.
  enum PartName {
    kRows, kInputNorm, kQkv, kHeads, kAttend, kMerge, kQuantise, kOutput, kMlpNorm, kGateUp, kDown, kNumParts,
    kEmbed = kRows, kFinalNorm = kInputNorm, kHead = kQkv  // of the layer after the last
  };

  struct Team {
    int index, count;
    bool is_wide;
    bool is_repeating;  // narrow, of a few decodes: what is cheap, each thread computes for itself
  };

  struct Block : Range {
    int index;
  };

  // ---- memory

  struct RowArray {
    size_t offset, row_bytes;
  };

  template <class T>
  void carve(T*& pointer, size_t count) {
    pointer = (T*)(memory_ + memory_bytes_);
    memory_bytes_ += (count * sizeof(T) + 63) / 64 * 64;
  }

  template <class T>
  void carve_rows(T*& pointer, size_t count_per_row) {
    row_arrays_.push_back({memory_bytes_, count_per_row * sizeof(T)});
    carve(pointer, max_rows_ * count_per_row);
  }

  void lay_out() {
    const size_t D = model_.head_dim, hidden_tiles = model_.hidden_size / kTileSize;
    memory_bytes_ = 0;
    row_arrays_.clear();
    carve_rows(hidden_, model_.hidden_size);
    carve_rows(attention_groups_, hidden_tiles);
    carve_rows(mlp_groups_, hidden_tiles);
    carve_rows(sampled_groups_, hidden_tiles);
    carve_rows(query_, query_size_);
    carve_rows(attended_, query_size_);
    carve_rows(attended_groups_, query_size_ / kTileSize);
    carve_rows(inner_groups_, model_.intermediate_size / kTileSize);
    carve_rows(cosine_, D / 2);
    carve_rows(sine_, D / 2);
    workspace_offset_ = memory_bytes_;
    workspaces_.resize(num_threads_);
    for (Workspace& w : workspaces_) {
      carve(w.qkv, (size_t)kBlockRows * qkv_stride_);
      carve(w.staged, (size_t)kBlockRows * kTileSize);
      carve(w.query, kMaxQueryRows * D);
      carve(w.keys, kTileKeys * D);
      carve(w.values, kTileKeys * D);
      carve(w.peak, kMaxQueryRows + kLanes);
      carve(w.sum, kMaxQueryRows + kLanes);
      carve(w.run_values, kMaxQueryRows * D);
      carve(w.tile_values, kAttendRows * D);
      carve(w.normed, model_.hidden_size);
      carve(w.attention_groups, kRepeatedRows * hidden_tiles);
      carve(w.mlp_groups, kRepeatedRows * hidden_tiles);
      carve(w.attended, (size_t)kRepeatedRows * query_size_);
      carve(w.attended_groups, kRepeatedRows * query_size_ / kTileSize);
    }
    partial_offset_ = memory_bytes_;
    const size_t partials = (size_t)split_rows() * heads_per_group_ * kMaxSplitTiles;
    carve(partial_peak_, partials + kLanes);
    carve(partial_sum_, partials + kLanes);
    carve(partial_values_, partials * D);
  }

  // Rows times KV heads of a step whose contexts may be split: fewer than so many.
  int split_rows() const { return num_threads_ == 1 ? 0 : kTasksPerThread * num_threads_; }

  // ---- the step

  void run(int index, int count) {
    const bool is_wide = count == 1 || step_->num_rows >= kWideRowsPerThread * count;
    const Team team{index, count, is_wide, is_repeating_ && !is_wide};
    const int last = model_.num_layers;
    if (is_wide) {
      together(team, last, 0, kEmbed, num_blocks(), [&](int i) {
        embed(block(i));
        attention_input(team, 0, block(i));
      });
      for (int layer = 0; layer < last; layer++) {
        attention(team, layer);
        together(team, layer, 0, kRows, num_blocks(), [&](int i) {
          attention_output_and_mlp(team, layer, block(i));
          if (layer + 1 < last) attention_input(team, layer + 1, block(i));
        });
      }
    } else {
      share_out(team, last, 0, kEmbed, {0, step_->num_rows}, [&](Range rows) { embed(rows); });
      for (int layer = 0; layer < last; layer++) {
        for (int i = 0; i < num_blocks(); i++) attention_input(team, layer, block(i));
        attention(team, layer);
        for (int i = 0; i < num_blocks(); i++) attention_output_and_mlp(team, layer, block(i));
      }
    }
    logits(team);
  }

  int num_blocks() const { return (step_->num_rows + kBlockRows - 1) / kBlockRows; }
  int most_blocks() const { return (max_rows_ + kBlockRows - 1) / kBlockRows; }
  Block block(int i) const { return {share({0, step_->num_rows}, i, num_blocks()), i}; }

  // Items that all threads of the step take part in.
  template <class Work>
  void together(const Team& team, int layer, int block, PartName name, int num_items, Work work) {
    if (team.count == 1) {
      for (int i = 0; i < num_items; i++) work(i);
      return;
    }
    Part& part = parts_[((size_t)layer * num_blocks() + block) * kNumParts + name];
    if (num_items <= Part::kMostItems && name != kAttend) {
      part.run_own_first(num_items, team.index, team.count, work);
    } else {
      part.run(num_items, work);
    }
  }

  // All of a range: alone where a wide step has given the rows to this thread, else with the others.
  template <class Work>
  void share_out(const Team& team, int layer, int block, PartName name, Range all, Work work) {
    if (team.is_wide) return work(all);
    const int items = std::min({all.size(), kItemsPerThread * team.count, Part::kMostItems});
    together(team, layer, block, name, items, [&](int i) { work(share(all, i, items)); });
  }

  // As share_out, of what is cheap enough to be computed by each thread for itself.
  template <class Work>
  void share_rows(const Team& team, int layer, const Block& rows, PartName name, Work work) {
    if (team.is_repeating) return work(Range(rows));
    share_out(team, layer, rows.index, name, rows, work);
  }

  AttentionInput* attention_groups(const Team& team, int row) {
    return (team.is_repeating ? workspaces_[team.index].attention_groups : attention_groups_) + (size_t)row * (model_.hidden_size / kTileSize);
  }
  MlpInput* mlp_groups(const Team& team, int row) {
    return (team.is_repeating ? workspaces_[team.index].mlp_groups : mlp_groups_) + (size_t)row * (model_.hidden_size / kTileSize);
  }
  float* attended(const Team& team, int row) {
    return (team.is_repeating ? workspaces_[team.index].attended : attended_) + (size_t)row * query_size_;
  }
  Group* attended_groups(const Team& team, int row) {
    return (team.is_repeating ? workspaces_[team.index].attended_groups : attended_groups_) + (size_t)row * (query_size_ / kTileSize);
  }
  Group* inner_groups(int row) { return inner_groups_ + (size_t)row * (model_.intermediate_size / kTileSize); }
  float* hidden(int row) { return hidden_ + (size_t)row * model_.hidden_size; }

  void embed(Range rows) {
    const int half = model_.head_dim / 2;
    for (int c = 0; c < step_->num_chunks; c++) {
      const ZsChunk& chunk = step_->chunks[c];
      const int first = std::max(rows.first, chunk.first_row), last = std::min(rows.last, chunk.first_row + chunk.num_rows);
      for (int row = first; row < last; row++) {
        dequantise_row(model_.embedding, step_->token_ids[row], hidden(row));
        const float position = (float)(chunk.start + row - chunk.first_row);
        for (int i = 0; i < half; i++) {
          const float angle = position * model_.inverse_frequencies[i];
          cosine_[(size_t)row * half + i] = cosf(angle);
          sine_[(size_t)row * half + i] = sinf(angle);
        }
      }
    }
  }

  // x / sqrt(mean(x^2) + eps) * weight.
  void rms_norm(const float* x, const float* weight, int size, float* out) const {
    F32 squares = zero();
    for (int i = 0; i < size; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    const F32 scale = set1(1.0f / sqrtf(reduce_add(squares) / (float)size + model_.rms_norm_eps));
    for (int i = 0; i < size; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  }

  template <class Input>
  void norm_and_quantise(const Team& team, Range rows, const float* weight, Input* out) {
    float* normed = workspaces_[team.index].normed;
    for (int row = rows.first; row < rows.last; row++) {
      rms_norm(hidden(row), weight, model_.hidden_size, normed);
      quantise(normed, model_.hidden_size, out + (size_t)row * (model_.hidden_size / kTileSize));
    }
  }

  // ---- before attention: norm, projection, rotation; keys and values go to the cache

  void attention_input(const Team& team, int index, const Block& rows) {
    const ZsLayer& layer = layers_[index];
    share_rows(team, index, rows, kInputNorm, [&](Range own) { norm_and_quantise(team, own, layer.input_norm, attention_groups(team, 0)); });
    float* qkv = workspaces_[team.is_wide ? team.index : 0].qkv;
    const int at[3] = {0, round_up(query_size_, kTileSize), round_up(query_size_, kTileSize) + round_up(kv_size_, kTileSize)};
    const ZsMatrix* matrices[3] = {&layer.q, &layer.k, &layer.v};
    int total = 0;
    for (const ZsMatrix* matrix : matrices) total += num_groups(*matrix);
    share_out(team, index, rows.index, kQkv, {0, total}, [&](Range mine) {
      for (int i = 0, first = 0; i < 3; i++) {
        const int count = num_groups(*matrices[i]);
        const int from = std::max(mine.first - first, 0), to = std::min(mine.last - first, count);
        if (from < to)
          project(*matrices[i], attention_groups(team, rows.first), model_.hidden_size / kTileSize, rows.size(), from, to, [&](int row, int group, const F32* sums) {
            float* out = qkv + (size_t)row * qkv_stride_ + at[i] + group * kTileSize;
            store(out, sums[0]);
            store(out + kLanes, sums[1]);
          });
        first += count;
      }
    });
    // A repeating step shares the heads of its rows, others the rows.
    const Range heads{0, model_.num_kv_heads};
    if (team.is_repeating) {
      share_out(team, index, rows.index, kHeads, heads, [&](Range own) { store_heads(index, rows, rows, own, qkv, at); });
    } else {
      share_out(team, index, rows.index, kHeads, rows, [&](Range own) { store_heads(index, rows, own, heads, qkv, at); });
    }
  }

  // Bias, norm and rotation of rows `own` of a block; queries are kept, keys and values of KV heads `heads` go to the cache.
  void store_heads(int index, const Block& rows, Range own, Range heads, float* qkv, const int* at) {
    const ZsLayer& layer = layers_[index];
    const int D = model_.head_dim, R = heads_per_group_;
    for (int c = first_chunk(own.first); c < step_->num_chunks && step_->chunks[c].first_row < own.last; c++) {
      const ZsChunk& chunk = step_->chunks[c];
      const int first = std::max(own.first, chunk.first_row), last = std::min(own.last, chunk.first_row + chunk.num_rows);
      for (int row = first; row < last; row++) {
        float* x = qkv + (size_t)(row - rows.first) * qkv_stride_;
        finish_heads(x, layer.q_bias, layer.q_norm, {heads.first * R, heads.last * R}, row);
        finish_heads(x + at[1], layer.k_bias, layer.k_norm, heads, row);
        if (layer.v_bias) add_bias(x + at[2], layer.v_bias, {heads.first * D, heads.last * D});
        for (int i = heads.first * R * D; i < heads.last * R * D; i += kLanes) store_bf16(query_ + (size_t)row * query_size_ + i, load(x + i));
        write_kv(index, chunk, chunk.start + row - chunk.first_row, heads, x + at[1], x + at[2]);
      }
    }
  }

  int first_chunk(int row) const {  // the chunk that holds a row
    const ZsChunk* end = step_->chunks + step_->num_chunks;
    const ZsChunk* after = std::upper_bound(step_->chunks, end, row, [](int r, const ZsChunk& chunk) { return r < chunk.first_row; });
    return std::max<int>((int)(after - step_->chunks) - 1, 0);
  }

  static void add_bias(float* x, const float* bias, Range at) {
    for (int i = at.first; i < at.last; i += kLanes) store(x + i, add(load(x + i), load(bias + i)));
  }

  // Bias, norm and rotation of some heads of one row, in place.
  void finish_heads(float* x, const float* bias, const float* norm, Range heads, int row) const {
    const int D = model_.head_dim, half = D / 2;
    if (bias) add_bias(x, bias, {heads.first * D, heads.last * D});
    const float *cosine = cosine_ + (size_t)row * half, *sine = sine_ + (size_t)row * half;
    x += heads.first * D;
    for (int head = heads.first; head < heads.last; head++, x += D) {
      if (norm) rms_norm(x, norm, D, x);
      for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
      }
    }
  }

  // Keys of (block, KV head, layer); the values follow.
  uint16_t* slab(int32_t block, int head, int layer) const {
    const size_t size = (size_t)model_.block_size * model_.head_dim;
    return kv_ + (((size_t)block * model_.num_kv_heads + head) * model_.num_layers + layer) * 2 * size;
  }

  void write_kv(int layer, const ZsChunk& chunk, int position, Range heads, const float* key, const float* value) const {
    const int D = model_.head_dim, S = model_.block_size, slot = position % S;
    const int32_t block = step_->block_tables[chunk.first_block + position / S];
    alignas(64) uint16_t k[kMaxHeadDim], v[kMaxHeadDim];
    for (int head = heads.first; head < heads.last; head++) {
      for (int d = 0; d < D; d += kLanes) {
        store_bf16(k + d, load(key + head * D + d));
        store_bf16(v + d, load(value + head * D + d));
      }
      uint16_t *keys = slab(block, head, layer), *values = keys + (size_t)S * D;
      if (has_pairs_) {
        for (int d = 0; d < D; d += 2) memcpy(keys + ((size_t)d / 2 * S + slot) * 2, k + d, 4);
        uint16_t* pairs = values + (size_t)(slot / 2) * D * 2 + slot % 2;
        for (int d = 0; d < D; d++) pairs[2 * d] = v[d];
      } else {
        memcpy(keys + (size_t)slot * D, k, D * 2);
        memcpy(values + (size_t)slot * D, v, D * 2);
      }
    }
  }

  // ---- attention

  static int num_tiles(int keys) { return (keys + kTileKeys - 1) / kTileKeys; }

  void plan_attention() {
    tasks_.clear();
    const int G = model_.num_kv_heads, most_rows = kMaxQueryRows / heads_per_group_;
    int64_t num_tasks = 0;
    for (int c = 0; c < step_->num_chunks; c++) num_tasks += (int64_t)G * ((step_->chunks[c].num_rows + most_rows - 1) / most_rows);
    const bool split = num_tasks < split_rows();
    int partial = 0;
    is_repeating_ = split && step_->num_rows <= kRepeatedRows;
    for (int c = 0; c < step_->num_chunks; c++) {
      const ZsChunk& chunk = step_->chunks[c];
      const int context = chunk.start + chunk.num_rows, tiles = num_tiles(context);
      for (int head = 0; head < G; head++) {
        if (split && chunk.num_rows == 1 && tiles <= kMaxSplitTiles) {
          for (int tile = 0; tile < tiles; tile++) tasks_.push_back({c, chunk.first_row, 1, head, tile, partial, kTileKeys});
          partial += heads_per_group_ * tiles;
        } else {
          is_repeating_ = false;
          for_even_pieces(chunk.num_rows, most_rows, [&](int first, int count) {
            tasks_.push_back({c, chunk.first_row + first, count, head, -1, 0, (int64_t)count * (chunk.start + first + count)});
          });
        }
      }
    }
    std::sort(tasks_.begin(), tasks_.end(), [](const Task& a, const Task& b) {
      return a.cost != b.cost ? a.cost > b.cost : a.head != b.head ? a.head < b.head : a.first_row != b.first_row ? a.first_row < b.first_row : a.tile < b.tile;
    });
    merges_.clear();
    for (size_t i = 0; i < tasks_.size(); i++)
      if (tasks_[i].tile == 0) merges_.push_back((int)i);
  }

  void attention(const Team& team, int layer) {
    Workspace& work = workspaces_[team.index];
    together(team, layer, 0, kAttend, (int)tasks_.size(), [&](int i) { attend(tasks_[i], layer, work); });
    const auto merge_row = [&](int i) { merge_partials(team, tasks_[merges_[i]], work); };
    const int count = (int)merges_.size();
    if (team.is_repeating) {
      for (int i = 0; i < count; i++) merge_row(i);
    } else {
      together(team, layer, 0, kMerge, count, merge_row);
    }
  }

  void attend(const Task& task, int layer, Workspace& work) {
    const ZsChunk& chunk = step_->chunks[task.chunk];
    const int D = model_.head_dim, R = heads_per_group_, rows = task.num_rows * R;
    for (int t = 0; t < task.num_rows; t++)
      memcpy(work.query + (size_t)t * R * D, query_ + (size_t)(task.first_row + t) * query_size_ + (size_t)task.head * R * D, (size_t)R * D * 2);
    const int first_position = chunk.start + task.first_row - chunk.first_row;
    const int context = first_position + task.num_rows;
    const bool is_whole = task.tile < 0;
    if (is_whole) reset(work, rows);
    const int first_tile = is_whole ? 0 : task.tile, last_tile = is_whole ? num_tiles(context) : task.tile + 1;
    const auto find = [&](int tile, KeyTile& keys) {
      const int first_key = tile * kTileKeys;
      find_keys(chunk, task.head, layer, first_key, std::min(context - first_key, kTileKeys), work, keys);
    };
    KeyTile keys, next;
    for (int tile = first_tile; tile < last_tile; tile++, keys = next) {
      const int first_key = tile * kTileKeys;
      if (tile == first_tile || !has_pairs_) find(tile, keys);
      next = keys;
      if (has_pairs_ && tile + 1 < last_tile) find(tile + 1, next);
      for_even_pieces(rows, kAttendRows, [&](int first, int count) {
        int visible[kAttendRows];
        int most = 0;
        for (int t = 0; t < count; t++) {
          visible[t] = std::min(first_position + (first + t) / R + 1 - first_key, kTileKeys);
          most = std::max(most, visible[t]);
        }
        if (most <= 0) return;
        const uint16_t* query = work.query + (size_t)first * D;
        alignas(64) float tile_peak[kLanes] = {}, tile_sum[kLanes] = {};
        const int at = task.partial + tile * R + first;
        float* peak = is_whole ? tile_peak : partial_peak_ + at;
        float* sum = is_whole ? tile_sum : partial_sum_ + at;
        float* values = is_whole ? work.tile_values : partial_values_ + (size_t)at * D;
        attend_rows(count, query, D, keys, next, visible, exponent_scale_, peak, sum, values);
        if (is_whole) merge(peak, sum, values, count, D, exponent_scale_, visible, work.peak + first, work.sum + first, work.run_values + (size_t)first * D);
      });
    }
    if (is_whole) finish(task, work, attended_);
  }

  void reset(Workspace& work, int rows) const {
    std::fill(work.peak, work.peak + rows, kNoScore);
    std::fill(work.sum, work.sum + rows, 0.0f);
    std::fill(work.run_values, work.run_values + (size_t)rows * model_.head_dim, 0.0f);
  }

  void merge_partials(const Team& team, const Task& task, Workspace& work) {
    const ZsChunk& chunk = step_->chunks[task.chunk];
    const int D = model_.head_dim, R = heads_per_group_, context = chunk.start + chunk.num_rows;
    reset(work, R);
    for (int tile = 0; tile < num_tiles(context); tile++)
      for_even_pieces(R, kAttendRows, [&](int first, int count) {
        int visible[kAttendRows];
        std::fill(visible, visible + kAttendRows, kTileKeys);
        const int at = task.partial + tile * R + first;
        merge(partial_peak_ + at, partial_sum_ + at, partial_values_ + (size_t)at * D, count, D, exponent_scale_, visible, work.peak + first,
              work.sum + first, work.run_values + (size_t)first * D);
      });
    finish(task, work, attended(team, 0));
  }

  void finish(const Task& task, const Workspace& work, float* attended) const {
    const int D = model_.head_dim, R = heads_per_group_;
    for (int i = 0; i < task.num_rows * R; i++) {
      float* out = attended + (size_t)(task.first_row + i / R) * query_size_ + (size_t)(task.head * R + i % R) * D;
      const F32 sum = set1(work.sum[i]);
      for (int d = 0; d < D; d += kLanes) store(out + d, div(load(work.run_values + (size_t)i * D + d), sum));
    }
  }

  void find_keys(const ZsChunk& chunk, int head, int layer, int first_key, int num_keys, Workspace& work, KeyTile& tile) const {
    const int S = model_.block_size, D = model_.head_dim;
    const int32_t* table = step_->block_tables + chunk.first_block;
    if (!has_pairs_) return gather_keys(table, head, layer, first_key, num_keys, work, tile);
    tile.key_stride = (size_t)2 * S;
    for (int group = 0; group * kLanes < num_keys; group++) {
      const int position = first_key + group * kLanes, slot = position % S;
      const uint16_t* keys = slab(table[position / S], head, layer);
      tile.keys[group] = keys + (size_t)slot * 2;
      tile.values[group] = keys + (size_t)S * D + (size_t)slot * D;
    }
  }

  // Blocks whose size is not a multiple of 16: the tile is put together in memory of the thread.
  void gather_keys(const int32_t* table, int head, int layer, int first_key, int num_keys, Workspace& work, KeyTile& tile) const {
    const int S = model_.block_size, D = model_.head_dim;
    memset(work.keys, 0, (size_t)kTileKeys * D * 2);
    memset(work.values, 0, (size_t)kTileKeys * D * 2);
    tile.key_stride = 2 * kLanes;
    for (int i = 0; i < num_keys; i++) {
      const int position = first_key + i, slot = position % S, lane = i % kLanes;
      const uint16_t* keys = slab(table[position / S], head, layer) + (size_t)slot * D;
      const uint16_t* values = keys + (size_t)S * D;
      uint16_t* to_keys = work.keys + (size_t)(i / kLanes) * kLanes * D;
      uint16_t* to_values = work.values + (size_t)(i / kLanes) * kLanes * D + (size_t)(lane / 2) * D * 2 + lane % 2;
      for (int d = 0; d < D; d++) {
        to_keys[(d / 2 * kLanes + lane) * 2 + d % 2] = keys[d];
        to_values[2 * d] = values[d];
      }
    }
    for (int group = 0; group < kKeyGroups; group++) {
      tile.keys[group] = work.keys + (size_t)group * kLanes * D;
      tile.values[group] = work.values + (size_t)group * kLanes * D;
    }
  }

  // ---- after attention: projection, norm, MLP

  void attention_output_and_mlp(const Team& team, int index, const Block& rows) {
    const ZsLayer& layer = layers_[index];
    const int H = model_.hidden_size, I = model_.intermediate_size;
    share_rows(team, index, rows, kQuantise, [&](Range own) {
      for (int row = own.first; row < own.last; row++) quantise(attended(team, row), query_size_, attended_groups(team, row));
    });
    const auto add_to_hidden = [&](int row, int group, const F32* sums) {
      float* x = hidden(rows.first + row) + group * kTileSize;
      store(x, add(load(x), sums[0]));
      store(x + kLanes, add(load(x + kLanes), sums[1]));
    };
    share_out(team, index, rows.index, kOutput, {0, num_groups(layer.output)}, [&](Range mine) {
      project(layer.output, attended_groups(team, rows.first), query_size_ / kTileSize, rows.size(), mine.first, mine.last, add_to_hidden);
    });
    share_rows(team, index, rows, kMlpNorm, [&](Range own) { norm_and_quantise(team, own, layer.mlp_norm, mlp_groups(team, 0)); });
    // Two groups of gate_up make 32 inner activations, which are one group for the matrix after it.
    float* staged = workspaces_[team.index].staged;
    share_out(team, index, rows.index, kGateUp, {0, I / kTileSize}, [&](Range pairs) {
      for (int pair = pairs.first; pair < pairs.last; pair++) {
        project(layer.gate_up, mlp_groups(team, rows.first), H / kTileSize, rows.size(), 2 * pair, 2 * pair + 2, [&](int row, int group, const F32* sums) {
          const F32 sigmoid = div(set1(1.0f), add(set1(1.0f), exp2(mul(sums[0], set1(-1.4426950408889634f)))));
          store(staged + row * kTileSize + group % 2 * kLanes, mul(mul(sums[0], sigmoid), sums[1]));
        });
        for (int row = 0; row < rows.size(); row++) quantise(staged + row * kTileSize, kTileSize, inner_groups(rows.first + row) + pair);
      }
    });
    share_out(team, index, rows.index, kDown, {0, num_groups(layer.down)}, [&](Range mine) {
      project(layer.down, inner_groups(rows.first), I / kTileSize, rows.size(), mine.first, mine.last, add_to_hidden);
    });
  }

  void logits(const Team& team) {
    const int H = model_.hidden_size, V = model_.vocab_size, R = step_->num_sampled, last = model_.num_layers;
    float* normed = workspaces_[team.index].normed;
    HeadInput* sampled = sampled_groups_;
    together(team, last, 0, kFinalNorm, R, [&](int i) {
      rms_norm(hidden(step_->sampled_rows[i]), model_.final_norm, H, normed);
      quantise(normed, H, sampled + (size_t)i * (H / kTileSize));
    });
    const int items = kItemsPerThread * team.count;
    together(team, last, 0, kHead, R ? items : 0, [&](int item) {
      const Range mine = share({0, num_groups(model_.head)}, item, items);
      for_even_pieces(R, kBlockRows, [&](int first, int count) {
        project(model_.head, sampled + (size_t)first * (H / kTileSize), H / kTileSize, count, mine.first, mine.last, [&](int row, int group, const F32* sums) {
          float* out = step_->logits + (size_t)(first + row) * V + (size_t)group * kTileSize;
          if ((group + 1) * kTileSize <= V) {
            store(out, sums[0]);
            store(out + kLanes, sums[1]);
          } else {
            float lanes[kTileSize];
            store(lanes, sums[0]);
            store(lanes + kLanes, sums[1]);
            memcpy(out, lanes, (V - group * kTileSize) * sizeof(float));
          }
        });
      });
    });
  }

  ZsModel model_;
  std::vector<ZsLayer> layers_;
  uint16_t* kv_;
  int max_rows_, num_threads_;
  int query_size_, kv_size_, heads_per_group_, qkv_stride_;
  bool has_pairs_;
  float exponent_scale_;
  const ZsStep* step_ = nullptr;
  bool is_repeating_ = false;
  std::vector<Task> tasks_;
  std::vector<int> merges_;  // the first task of each row and head whose context is split
  std::vector<Part> parts_;
  uint8_t* memory_ = nullptr;
  size_t memory_bytes_ = 0, workspace_offset_ = 0, partial_offset_ = 0;
  std::vector<RowArray> row_arrays_;
  int dirty_rows_ = 0;
  bool has_partials_ = false;  // since the last scrub
  float *hidden_, *attended_, *cosine_, *sine_, *partial_peak_, *partial_sum_, *partial_values_;
  uint16_t* query_;
  AttentionInput* attention_groups_;
  MlpInput* mlp_groups_;
  HeadInput* sampled_groups_;
  Group *attended_groups_, *inner_groups_;
  std::vector<Workspace> workspaces_;
};

}  // namespace zs

extern "C" int32_t zs_abi_version() { return ZS_ABI_VERSION; }
extern "C" const char* zs_path() { return zs::kPathName; }
extern "C" int64_t zs_tile_bytes(int32_t kind) { return zs::tile_bytes(kind); }

extern "C" void* zs_create(const ZsModel* model, void* kv, int32_t max_rows, int32_t num_threads) {
  if (!zs::Engine::supports(*model, max_rows, num_threads)) return nullptr;
  auto* engine = new (std::nothrow) zs::Engine(*model, (uint16_t*)kv, max_rows, num_threads);
  if (engine && !engine->allocate()) {
    delete engine;
    return nullptr;
  }
  return engine;
}
extern "C" void zs_destroy(void* engine) { delete (zs::Engine*)engine; }
extern "C" void zs_step(void* engine, const ZsStep* step) { ((zs::Engine*)engine)->step(*step); }
extern "C" int64_t zs_scratch_bytes(const void* engine) { return ((const zs::Engine*)engine)->scratch_bytes(); }
extern "C" void zs_scrub(void* engine) { ((zs::Engine*)engine)->scrub(); }
