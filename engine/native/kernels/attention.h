// Causal attention over the paged KV cache, for one KV head and any number of query rows at a time.
//
// The context is cut into tiles of kTileKeys keys, counted from position 0. A tile's result (maximum, sum, weighted
// values) is computed on its own and then merged into the row's running result, tile after tile. This order is the
// same for a decode and for a prefill, for every chunk size and number of threads, so the bits are too.
#pragma once
#include "simd.h"

namespace zs {

constexpr int kTileKeys = 128;
constexpr int kKeyGroups = kTileKeys / kLanes;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueryRows = 96;  // of one task
constexpr float kNoScore = -1e30f;

// Where the keys and values of up to kTileKeys positions lie: group i holds 16 of them. Keys: pairs of
// dimensions, `key_stride` elements apart, each with 16 lanes. Values: pairs of positions, 2 D elements apart.
struct KeyTile {
  const uint16_t* keys[kKeyGroups];
  const uint16_t* values[kKeyGroups];
  size_t key_stride;
};

// A decode reads each key and value once, from blocks that lie anywhere, and the processor's own prefetching starts
// anew in each of them. So a tile's values are asked for while its keys are scored, and the next tile's keys while its
// values are weighed.

template <int ROWS, int GROUPS>
ZS_INLINE void score_groups(const uint16_t* q, int head_dim, const KeyTile& tile, int first, float (*scores)[kTileKeys]) {
  F32 sums[ROWS][GROUPS];
  for (int t = 0; t < ROWS; t++)
    for (int g = 0; g < GROUPS; g++) sums[t][g] = zero();
  const uint16_t* keys[GROUPS];
  for (int g = 0; g < GROUPS; g++) keys[g] = tile.keys[first + g];
  const size_t key_stride = tile.key_stride;
  for (int d = 0; d < head_dim; d += 2) {
    Pairs pairs[GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      pairs[g] = load_pairs(keys[g]);
      keys[g] += key_stride;
      __builtin_prefetch(tile.values[first + g] + d * kLanes);
    }
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 4
      for (int g = 0; g < GROUPS; g++) sums[t][g] = dot2(sums[t][g], pairs[g], q + t * head_dim + d);
  }
  for (int t = 0; t < ROWS; t++)
    for (int g = 0; g < GROUPS; g++) store(scores[t] + (first + g) * kLanes, sums[t][g]);
}

// Weighted sum of values, dimensions [16 first, 16 (first + VECTORS)): out (ROWS, D).
template <int ROWS, int VECTORS>
ZS_INLINE void weigh_values(const uint16_t (*weights)[kTileKeys], int num_keys, int head_dim, const KeyTile& tile, const KeyTile& next,
                            int first, float* out) {
  F32 sums[ROWS][VECTORS];
  for (int t = 0; t < ROWS; t++)
    for (int v = 0; v < VECTORS; v++) sums[t][v] = zero();
  const auto add_pair = [&](int key, bool is_last_odd) __attribute__((always_inline)) {
    const uint16_t* at = tile.values[key / kLanes] + key % kLanes * head_dim + first * 2 * kLanes;
    const uint16_t* ahead = next.keys[key / kLanes] + key % kLanes * head_dim + first * 2 * kLanes;
    Pairs pairs[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      __builtin_prefetch(ahead + v * 2 * kLanes);
      pairs[v] = load_pairs(at + v * 2 * kLanes);
      if (is_last_odd) pairs[v] = keep_even(pairs[v]);
    }
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[t][v] = dot2(sums[t][v], pairs[v], weights[t] + key);
  };
  int key = 0;
  for (; key + 1 < num_keys; key += 2) add_pair(key, false);
  if (key < num_keys) add_pair(key, true);  // the slot after the last key may hold anything, NaN included
  for (int t = 0; t < ROWS; t++)
    for (int v = 0; v < VECTORS; v++) store(out + t * head_dim + (first + v) * kLanes, sums[t][v]);
}

// Merges a tile's result into the running one, for `rows` rows with at least one key in the tile.
ZS_INLINE void merge(const float* peak, const float* sum, const float* values, int rows, int head_dim, float exponent_scale,
                     const int* num_keys, float* run_peak, float* run_sum, float* run_values) {
  float old_weight[kLanes], new_weight[kLanes];
  F32 before = load(run_peak), after = max(before, load(peak)), scale = set1(exponent_scale);
  F32 w0 = exp2(mul(sub(before, after), scale)), w1 = exp2(mul(sub(load(peak), after), scale));
  float merged_peak[kLanes], merged_sum[kLanes];
  store(old_weight, w0);
  store(new_weight, w1);
  store(merged_peak, after);
  store(merged_sum, fma(w1, load(sum), mul(w0, load(run_sum))));
  for (int t = 0; t < rows; t++) {
    if (num_keys[t] <= 0) continue;
    run_peak[t] = merged_peak[t];
    run_sum[t] = merged_sum[t];
    F32 a = set1(old_weight[t]), b = set1(new_weight[t]);
    for (int d = 0; d < head_dim; d += kLanes) {
      float* at = run_values + t * head_dim + d;
      store(at, fma(b, load(values + t * head_dim + d), mul(a, load(at))));
    }
  }
}

// One tile for `ROWS` query rows q (ROWS, D); row t sees the first num_keys[t] keys of it (none: skipped).
// The result of the tile alone goes to peak (16), sum (16) and values (ROWS, D).
template <int ROWS>
static __attribute__((noinline)) void attend_tile(const uint16_t* q, int head_dim, const KeyTile& tile, const KeyTile& next,
                                                  const int* num_keys, float exponent_scale, float* peak, float* sum, float* values) {
  alignas(64) float scores[ROWS][kTileKeys];
  alignas(64) uint16_t weights[ROWS][kTileKeys];
  int most = 0;
  for (int t = 0; t < ROWS; t++) most = num_keys[t] > most ? num_keys[t] : most;
  const int groups = (most + kLanes - 1) / kLanes;
  int group = 0;
  for (; group + kKeyGroupsAtOnce <= groups; group += kKeyGroupsAtOnce)
    score_groups<ROWS, kKeyGroupsAtOnce>(q, head_dim, tile, group, scores);
  for (; group < groups; group++) score_groups<ROWS, 1>(q, head_dim, tile, group, scores);

  const F32 scale = set1(exponent_scale);
  for (int t = 0; t < ROWS; t++) {
    F32 top = set1(kNoScore);
    for (int g = 0; g < groups; g++) top = max(top, keep_first(load(scores[t] + g * kLanes), num_keys[t] - g * kLanes, set1(kNoScore)));
    peak[t] = reduce_max(top);
    F32 total = zero(), shift = set1(peak[t]);
    for (int g = 0; g < groups; g++) {
      F32 weight = exp2(mul(sub(load(scores[t] + g * kLanes), shift), scale));
      weight = keep_first(weight, num_keys[t] - g * kLanes, zero());
      total = add(total, weight);
      store_bf16(weights[t] + g * kLanes, weight);
    }
    sum[t] = reduce_add(total);
  }
  const int vectors = head_dim / kLanes;
  constexpr int at_once = kKeyGroupsAtOnce;
  int vector = 0;
  for (; vector + at_once <= vectors; vector += at_once)
    weigh_values<ROWS, at_once>(weights, most, head_dim, tile, next, vector, values);
  for (; vector < vectors; vector++) weigh_values<ROWS, 1>(weights, most, head_dim, tile, next, vector, values);
}

static inline void attend_rows(int rows, const uint16_t* q, int head_dim, const KeyTile& tile, const KeyTile& next, const int* num_keys,
                               float exponent_scale, float* peak, float* sum, float* values) {
  switch (rows) {
    case 1: return attend_tile<1>(q, head_dim, tile, next, num_keys, exponent_scale, peak, sum, values);
    case 2: return attend_tile<2>(q, head_dim, tile, next, num_keys, exponent_scale, peak, sum, values);
    case 3: return attend_tile<3>(q, head_dim, tile, next, num_keys, exponent_scale, peak, sum, values);
    case 4: return attend_tile<4>(q, head_dim, tile, next, num_keys, exponent_scale, peak, sum, values);
    case 5: return attend_tile<5>(q, head_dim, tile, next, num_keys, exponent_scale, peak, sum, values);
    case 6: return attend_tile<6>(q, head_dim, tile, next, num_keys, exponent_scale, peak, sum, values);
  }
}

constexpr int kAttendRows = 6;

}  // namespace zs
