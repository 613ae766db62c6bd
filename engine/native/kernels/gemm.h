// Products of int8 activations with 4- and 8-bit weights. One output is one chain of operations over the columns, in
// their order, whatever shares the registers with it: so a row's result does not depend on the other rows.
#pragma once
#include "abi.h"
#include "simd.h"

namespace zs {

constexpr int kTileSize = 32;  // rows and columns of a weight tile, and values of one activation scale

// 32 activations in 8 bits: value = codes * scale.
struct Group {
  static constexpr int kPlanes = 1;
  int8_t codes[32];
  float scale;
  float sum;       // of the 32 values
  float sum_head;  // of the first 16
};

// 32 activations in 16 bits, for inputs whose rounding shows in the output: value = (256 codes + fine) * scale / 256.
struct FineGroup {
  static constexpr int kPlanes = 2;
  int8_t codes[32];
  float scale;
  float sum;
  float sum_head;
  int8_t fine[32];
};

template <int KIND>
struct Format;
template <>
struct Format<ZS_Q4_HALF> {
  static constexpr int kBits = 4, kScales = 1, kTileBytes = 640;
};
template <>
struct Format<ZS_Q4_FLOAT> {
  static constexpr int kBits = 4, kScales = 1, kTileBytes = 768;
};
template <>
struct Format<ZS_Q8_HALF> {
  static constexpr int kBits = 8, kScales = 1, kTileBytes = 1088;
};
template <>
struct Format<ZS_Q8_SPLIT> {
  static constexpr int kBits = 8, kScales = 2, kTileBytes = 1280;
};

static inline int64_t tile_bytes(int kind) {
  switch (kind) {
    case ZS_Q4_HALF: return Format<ZS_Q4_HALF>::kTileBytes;
    case ZS_Q4_FLOAT: return Format<ZS_Q4_FLOAT>::kTileBytes;
    case ZS_Q8_HALF: return Format<ZS_Q8_HALF>::kTileBytes;
    case ZS_Q8_SPLIT: return Format<ZS_Q8_SPLIT>::kTileBytes;
  }
  return 0;
}

// Scale and offset of 16 rows of a tile: w = scale * code + offset.
template <int KIND>
ZS_INLINE void row_scales(const uint8_t* tile, int half, F32 scale[2], F32& offset) {
  constexpr int codes_bytes = Format<KIND>::kBits * 128;
  const uint8_t* at = tile + codes_bytes;
  if constexpr (KIND == ZS_Q4_HALF) {
    scale[0] = load_half(at + 32 * half);
    offset = load_half(at + 64 + 32 * half);
  } else if constexpr (KIND == ZS_Q4_FLOAT) {
    scale[0] = load((const float*)(at + 64 * half));
    offset = load((const float*)(at + 128 + 64 * half));
  } else if constexpr (KIND == ZS_Q8_HALF) {
    scale[0] = load_half(at + 32 * half);
    offset = mul(scale[0], set1(-128.0f));
  } else {
    scale[0] = load((const float*)(at + 64 * half));
    scale[1] = load((const float*)(at + 128 + 64 * half));
    offset = zero();
  }
}

ZS_INLINE const int8_t* plane_codes(const Group& group, int) { return group.codes; }
ZS_INLINE const int8_t* plane_codes(const FineGroup& group, int plane) { return plane ? group.fine : group.codes; }

// Adds one tile of `HALVES` halves from `first_half` on, times `ROWS` groups, to `sums`.
template <int KIND, int ROWS, int HALVES, class Input>
ZS_INLINE void add_tile(const uint8_t* tile, int first_half, const Input* const (&a)[ROWS], int column, F32 (&sums)[ROWS][HALVES]) {
  constexpr int bits = Format<KIND>::kBits, scales = Format<KIND>::kScales, half_bytes = bits * 64;
  I32 dots[ROWS][HALVES][scales];
  for (int t = 0; t < ROWS; t++)
    for (int h = 0; h < HALVES; h++)
      for (int s = 0; s < scales; s++) dots[t][h][s] = izero();
  const uint8_t* codes = tile + first_half * half_bytes;
#pragma GCC unroll 2
  for (int plane = 0; plane < Input::kPlanes; plane++) {
    const int8_t* values[ROWS];
    for (int t = 0; t < ROWS; t++) values[t] = plane_codes(a[t][column], plane);
    if (plane == 1)
      for (int t = 0; t < ROWS; t++)
        for (int h = 0; h < HALVES; h++)
          for (int s = 0; s < scales; s++) dots[t][h][s] = times_256(dots[t][h][s]);
    if constexpr (bits == 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        Codes low[HALVES], high[HALVES];
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++) {
          Codes both = load_codes(codes + h * half_bytes + 64 * j);
          low[h] = low_nibbles(both);
          high[h] = high_nibbles(both);
        }
#pragma GCC unroll 6
        for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 2
          for (int h = 0; h < HALVES; h++) dots[t][h][0] = dot4<4>(dots[t][h][0], low[h], values[t] + 4 * j);
#pragma GCC unroll 6
        for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 2
          for (int h = 0; h < HALVES; h++) dots[t][h][0] = dot4<4>(dots[t][h][0], high[h], values[t] + 16 + 4 * j);
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        Codes all[HALVES];
#pragma GCC unroll 2
        for (int h = 0; h < HALVES; h++) all[h] = load_codes(codes + h * half_bytes + 64 * j);
#pragma GCC unroll 6
        for (int t = 0; t < ROWS; t++)
#pragma GCC unroll 2
          for (int h = 0; h < HALVES; h++) {
            I32& dot = dots[t][h][scales == 2 ? j / 4 : 0];
            dot = dot4<8>(dot, all[h], values[t] + 4 * j);
          }
      }
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < HALVES; h++) {
    F32 scale[2], offset;
    row_scales<KIND>(tile, first_half + h, scale, offset);
    F32 unit[2] = {scale[0], scale[scales - 1]};  // of one step of the dot product
    if (Input::kPlanes == 2)
      for (int s = 0; s < scales; s++) unit[s] = mul(scale[s], set1(1.0f / 256));
#pragma GCC unroll 6
    for (int t = 0; t < ROWS; t++) {
      const Input& group = a[t][column];
      F32 x = set1(group.scale);
      F32& sum = sums[t][h];
      sum = fma(to_float(dots[t][h][0]), mul(unit[0], x), sum);
      if constexpr (scales == 2) {
        sum = fma(to_float(dots[t][h][scales - 1]), mul(unit[1], x), sum);
        sum = fma(mul(scale[0], set1(-128.0f)), set1(group.sum_head), sum);
        sum = fma(mul(scale[1], set1(-128.0f)), set1(group.sum - group.sum_head), sum);
      } else {
        sum = fma(offset, set1(group.sum), sum);
      }
    }
  }
}

// 32 rows of weights times `ROWS` rows of activations.
template <int KIND, int ROWS, class Input>
static __attribute__((noinline)) void multiply(const uint8_t* tiles, int num_tiles, const Input* a, size_t stride, F32 (*out)[2]) {
  const Input* rows[ROWS];
  for (int t = 0; t < ROWS; t++) rows[t] = a + t * stride;
  for (int first_half = 0; first_half < 2; first_half += kHalvesAtOnce) {
    F32 sums[ROWS][kHalvesAtOnce];
    for (int t = 0; t < ROWS; t++)
      for (int h = 0; h < kHalvesAtOnce; h++) sums[t][h] = zero();
    const uint8_t* tile = tiles;
    for (int column = 0; column < num_tiles; column++, tile += Format<KIND>::kTileBytes)
      add_tile<KIND, ROWS, kHalvesAtOnce, Input>(tile, first_half, rows, column, sums);
    for (int t = 0; t < ROWS; t++)
      for (int h = 0; h < kHalvesAtOnce; h++) out[t][first_half + h] = sums[t][h];
  }
}

template <int KIND, class Input>
ZS_INLINE void multiply_rows(int rows, const uint8_t* tiles, int num_tiles, const Input* a, size_t stride, F32 (*out)[2]) {
  switch (rows) {
    case 1: return multiply<KIND, 1, Input>(tiles, num_tiles, a, stride, out);
    case 2: return multiply<KIND, 2, Input>(tiles, num_tiles, a, stride, out);
#if !defined(ZS_PATH_PORTABLE)
    case 3: return multiply<KIND, 3, Input>(tiles, num_tiles, a, stride, out);
#endif
#if defined(ZS_PATH_AVX512)
    case 4: return multiply<KIND, 4, Input>(tiles, num_tiles, a, stride, out);
    case 5: return multiply<KIND, 5, Input>(tiles, num_tiles, a, stride, out);
    case 6: return multiply<KIND, 6, Input>(tiles, num_tiles, a, stride, out);
#endif
  }
}

// Cuts `num_rows` into pieces of at most kTileRows that differ by one at most: calls visit(first, count).
template <class Visit>
ZS_INLINE void for_even_pieces(int num_rows, int most, Visit visit) {
  int pieces = (num_rows + most - 1) / most;
  for (int i = 0; i < pieces; i++) {
    int first = num_rows * i / pieces;
    visit(first, num_rows * (i + 1) / pieces - first);
  }
}

// Rows [0, num_rows) of `a` times row groups [first_group, last_group) of 32 weight rows each. Calls
// sink(row, group, sums) with the 32 sums of each, as two halves of 16.
template <int KIND, class Input, class Sink>
static void project_kind(const ZsMatrix& matrix, const Input* a, size_t stride, int num_rows, int first_group, int last_group, Sink sink) {
  const int num_tiles = matrix.columns / kTileSize;
  const size_t group_bytes = (size_t)num_tiles * Format<KIND>::kTileBytes;
  for (int group = first_group; group < last_group; group++) {
    const uint8_t* tiles = matrix.tiles + group * group_bytes;
    for_even_pieces(num_rows, kTileRows, [&](int first, int count) {
      F32 sums[kTileRows][2];
      multiply_rows<KIND, Input>(count, tiles, num_tiles, a + first * stride, stride, sums);
      for (int t = 0; t < count; t++) sink(first + t, group, sums[t]);
    });
  }
}

template <class Input, class Sink>
static void project(const ZsMatrix& matrix, const Input* a, size_t stride, int num_rows, int first_group, int last_group, Sink sink) {
  switch (matrix.kind) {
    case ZS_Q4_HALF: return project_kind<ZS_Q4_HALF>(matrix, a, stride, num_rows, first_group, last_group, sink);
    case ZS_Q4_FLOAT: return project_kind<ZS_Q4_FLOAT>(matrix, a, stride, num_rows, first_group, last_group, sink);
    case ZS_Q8_HALF: return project_kind<ZS_Q8_HALF>(matrix, a, stride, num_rows, first_group, last_group, sink);
    case ZS_Q8_SPLIT: return project_kind<ZS_Q8_SPLIT>(matrix, a, stride, num_rows, first_group, last_group, sink);
  }
}

static inline int num_groups(const ZsMatrix& matrix) { return (matrix.rows + kTileSize - 1) / kTileSize; }

// x (count, a multiple of 32) to groups.
static inline void quantise(const float* x, int count, Group* out) {
  for (int i = 0; i < count / kTileSize; i++) {
    int32_t sums[2];
    Group& group = out[i];
    group.scale = quantise32(x + i * kTileSize, group.codes, sums);
    group.sum = group.scale * (float)(sums[0] + sums[1]);
    group.sum_head = group.scale * (float)sums[0];
  }
}

static inline void quantise(const float* x, int count, FineGroup* out) {
  for (int i = 0; i < count / kTileSize; i++) {
    int32_t sums[2], fine_sums[2];
    FineGroup& group = out[i];
    const float scale = quantise32(x + i * kTileSize, group.codes, sums);
    quantise_rest32(x + i * kTileSize, group.codes, scale, group.fine, fine_sums);
    group.scale = scale;
    group.sum_head = scale * ((float)sums[0] + (float)fine_sums[0] * (1.0f / 256));
    group.sum = scale * ((float)(sums[0] + sums[1]) + (float)(fine_sums[0] + fine_sums[1]) * (1.0f / 256));
  }
}

// One row of a matrix as floats: out (columns).
static inline void dequantise_row(const ZsMatrix& matrix, int row, float* out) {
  const int64_t bytes = tile_bytes(matrix.kind);
  const int num_tiles = matrix.columns / kTileSize, in_tile = row % kTileSize, half = in_tile / 16, lane = in_tile % 16;
  const uint8_t* tile = matrix.tiles + (row / kTileSize) * num_tiles * bytes;
  const bool has_four_bits = matrix.kind == ZS_Q4_HALF || matrix.kind == ZS_Q4_FLOAT;
  const auto half_at = [&](const uint8_t* p) {
    uint16_t bits;
    memcpy(&bits, p + 2 * in_tile, 2);
    return half_to_float(bits);
  };
  const auto float_at = [&](const uint8_t* p) {
    float value;
    memcpy(&value, p + 4 * in_tile, 4);
    return value;
  };
  for (int b = 0; b < num_tiles; b++, tile += bytes, out += kTileSize) {
    if (has_four_bits) {
      const bool is_half = matrix.kind == ZS_Q4_HALF;
      const float scale = is_half ? half_at(tile + 512) : float_at(tile + 512);
      const float offset = is_half ? half_at(tile + 576) : float_at(tile + 640);
      const uint8_t* codes = tile + half * 256 + lane * 4;
      for (int k = 0; k < kTileSize; k++) out[k] = scale * (float)(codes[k / 4 % 4 * 64 + k % 4] >> (k / 16 * 4) & 15) + offset;
    } else {
      const bool is_split = matrix.kind == ZS_Q8_SPLIT;
      const float scale = is_split ? float_at(tile + 1024) : half_at(tile + 1024);
      const float second = is_split ? float_at(tile + 1024 + 128) : scale;
      const uint8_t* codes = tile + half * 512 + lane * 4;
      for (int k = 0; k < kTileSize; k++) out[k] = (k < 16 ? scale : second) * (float)(codes[k / 4 * 64 + k % 4] - 128);
    }
  }
}

}  // namespace zs
