// Chooses one token of one row of logits. engine/draw.py states the rule; both give the same token, bit for bit:
// weights are made of IEEE additions and multiplications in one order, and are then rounded to multiples of 2^-34,
// whose sums are exact in double whatever their order.
//
// Plain C++ and the compiler's own vectors on every instruction path. A row of n floats is read in blocks of 64.
#pragma once
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#if defined(ZS_PATH_AVX512)
#include <immintrin.h>
#endif

namespace zs {
namespace sampling {

constexpr int kBlock = 64;  // floats
#if defined(ZS_PATH_AVX512)
constexpr int kVector = 16;  // the compiler takes wider vectors than the machine's apart, one float at a time
#elif defined(ZS_PATH_AVX2)
constexpr int kVector = 8;
#else
constexpr int kVector = 4;
#endif
constexpr int kBuckets = 1024;
constexpr double kRounding = 393216.0;  // 1.5 * 2^18: adding it to a double below 2^17 rounds to 2^-34
constexpr double kLog2E = 1.4426950408889634;
constexpr double kSmallestCut = 1.1641532182693481e-10;  // 2^-33

typedef float Floats __attribute__((vector_size(4 * kVector)));
typedef uint32_t Bits __attribute__((vector_size(4 * kVector)));

static inline int32_t num_blocks(int32_t n) { return (n + kBlock - 1) / kBlock; }
static inline int32_t padded(int32_t n) { return num_blocks(n) * kBlock; }

// What one call works with; the caller owns the memory. `values`, `ids`, `weights`: candidates, by ascending id.
struct Scratch {
  double* weights;   // (padded n)
  double* sums;      // (blocks)
  float* row;        // (padded n) what may be drawn: -infinity where the mask or the padding says no
  float* values;     // (padded n)
  int32_t* ids;      // (padded n)
  int32_t* order;    // (padded n)
  float* peaks;      // (blocks) greatest value of each block
  float* peaks_copy;

  static int64_t bytes(int32_t n) { return 24 * (int64_t)padded(n) + 16 * (int64_t)num_blocks(n); }

  Scratch(void* memory, int32_t n) {
    weights = (double*)memory;
    sums = weights + padded(n);
    row = (float*)(sums + num_blocks(n));
    values = row + padded(n);
    ids = (int32_t*)(values + padded(n));
    order = ids + padded(n);
    peaks = (float*)(order + padded(n));
    peaks_copy = peaks + num_blocks(n);
  }
};

// 2^((x - peak) * cold), rounded to multiples of 2^-34, of kBlock values; 1 for the peak. Returns their sum.
static double weigh(const float* x, float peak, float cold, double* weights) {
  float block[kBlock];
  for (int i = 0; i < kBlock; i += kVector) {
    Floats v;
    memcpy(&v, x + i, sizeof v);
    v = (v - peak) * cold;
    v = v > -44.0f ? v : Floats{} - 44.0f;
    Floats shifted = v + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    Floats r = v - (shifted - 12582912.0f);
    Floats y = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    y = y * r + 9.618437357674640e-3f;
    y = y * r + 5.550332471162809e-2f;
    y = y * r + 2.402264791363012e-1f;
    y = y * r + 6.931472028550421e-1f;
    y = y * r + 1.0f;
    Bits power = ((Bits)shifted << 23) + 0x3f800000;
    y = y * (Floats)power;
    memcpy(block + i, &y, sizeof y);
  }
  double sums[8] = {};
  for (int i = 0; i < kBlock; i += 8) {
    for (int j = 0; j < 8; j++) {
      double weight = ((double)block[i + j] + kRounding) - kRounding;
      weights[i + j] = weight;
      sums[j] += weight;
    }
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The weight of each block of a row into `sums`; returns that of all.
static double weigh_row(const float* row, int32_t n, float peak, float cold, double* sums) {
  double total = 0;
  for (int32_t block = 0; block < num_blocks(n); block++) {
    double weights[kBlock];
    total += sums[block] = weigh(row + block * kBlock, peak, cold, weights);
  }
  return total;
}

static float greatest_of(const Floats& v) {
#if defined(ZS_PATH_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lanes[kVector];
  memcpy(lanes, &v, sizeof v);
  for (int width = kVector / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  }
  return lanes[0];
#endif
}

// Fills `scratch.peaks` and returns the greatest value, NaN where there is one. `mask`: bit i of it allows column i;
// 0 allows all. The row that may be read in whole blocks from here on is returned in `row`.
static float scan(const float** row, const uint32_t* mask, int32_t n, const Scratch& scratch) {
  const float* x = *row;
  if (mask != 0 || n % kBlock != 0) {
    float* copy = scratch.row;
    memcpy(copy, x, 4 * (size_t)n);
    for (int32_t i = n; i < padded(n); i++) copy[i] = -INFINITY;
    for (int32_t word = 0; mask != 0 && word < (n + 31) / 32; word++) {
      if (mask[word] == 0xffffffff) continue;
      float* columns = copy + word * 32;
      if (mask[word] == 0) {
        std::fill_n(columns, 32, -INFINITY);
        continue;
      }
      for (int i = 0; i < 32; i++) columns[i] = mask[word] >> i & 1 ? columns[i] : -INFINITY;
    }
    *row = x = copy;
  }
  float greatest = -INFINITY;
  Bits broken = {};
  for (int32_t block = 0; block < num_blocks(n); block++) {
    Floats most = Floats{} - INFINITY;
    for (int i = 0; i < kBlock; i += kVector) {
      Floats v;
      memcpy(&v, x + block * kBlock + i, sizeof v);
      broken |= (Bits)(v != v);
      most = v > most ? v : most;
    }
    scratch.peaks[block] = greatest_of(most);
    greatest = std::max(greatest, scratch.peaks[block]);
  }
  for (int i = 0; i < kVector; i++) greatest = broken[i] ? NAN : greatest;
  return greatest;
}

static int32_t first_of(const float* row, float peak, const Scratch& scratch) {
  int32_t block = 0;
  while (scratch.peaks[block] != peak) block++;
  int32_t index = block * kBlock;
  while (row[index] != peak) index++;
  return index;
}

// The columns of at least `floor` and above -infinity, by ascending id, into `scratch.values` and `scratch.ids`.
// Returns how many.
static int32_t collect(const float* row, int32_t n, double floor, const Scratch& scratch) {
  int32_t count = 0;
  floor = std::max(floor, (double)-FLT_MAX);
  for (int32_t block = 0; block < num_blocks(n); block++) {
    if (!((double)scratch.peaks[block] >= floor)) continue;
    int32_t start = block * kBlock, width = std::min(kBlock, n - start);
    int i = 0;
#if defined(ZS_PATH_AVX512)
    // A block's values and ids are compressed in registers; what a store writes past `count` is overwritten.
    float least = (float)floor;
    if ((double)least < floor) least = nextafterf(least, INFINITY);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + kVector <= width; i += kVector) {
      __m512 v = _mm512_loadu_ps(row + start + i);
      __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_set1_ps(least), _CMP_GE_OQ);
      _mm512_storeu_ps(scratch.values + count, _mm512_maskz_compress_ps(kept, v));
      __m512i id = _mm512_add_epi32(lane, _mm512_set1_epi32(start + i));
      _mm512_storeu_si512(scratch.ids + count, _mm512_maskz_compress_epi32(kept, id));
      count += __builtin_popcount(kept);
    }
#endif
    for (; i < width; i++) {
      scratch.values[count] = row[start + i];
      scratch.ids[count] = start + i;
      count += (double)row[start + i] >= floor;
    }
  }
  return count;
}

struct Boundary {
  float value;    // of the last candidate taken
  int32_t equal;  // how many of that value are taken
  double mass;    // of all that are taken
};

// Takes candidates, greatest value first and of equal values the first ones, until their mass reaches `need`,
// which must be at most the mass of all. Mass: `scratch.weights`, or 1 each where not `weighted`. `floor`: at most
// the least value, or -infinity.
static Boundary boundary(int32_t count, double need, float peak, double floor, bool weighted, const Scratch& scratch) {
  const float* values = scratch.values;
  double least = floor;
  if (floor == -INFINITY) {
    least = peak;
    for (int32_t i = 0; i < count; i++) least = values[i] < least ? values[i] : least;
  }
  // The greater the value, the earlier its bucket.
  float scale = least < peak ? (float)((kBuckets - 1) / (peak - least)) : 1.0f;
  int32_t* buckets = scratch.order;
  for (int32_t i = 0; i < count; i++) {
    float place = (peak - values[i]) * scale;
    buckets[i] = (int32_t)(place < kBuckets - 1 ? place : kBuckets - 1);
  }
  double masses[kBuckets] = {};
  for (int32_t i = 0; i < count; i++) masses[buckets[i]] += weighted ? scratch.weights[i] : 1.0;
  int32_t crossing = 0;
  double mass = 0;
  while (crossing < kBuckets - 1 && mass + masses[crossing] < need) mass += masses[crossing++];
  int32_t members = 0;
  for (int32_t start = 0; start < count; start += kVector) {
    int32_t end = std::min(start + kVector, count), hits = 0;
    for (int32_t i = start; i < end; i++) hits += buckets[i] == crossing;
    for (int32_t i = start; hits > 0 && i < end; i++) {
      if (buckets[i] == crossing) scratch.order[members++] = i;  // no further than i: that bucket was read
    }
  }
  std::sort(scratch.order, scratch.order + members, [&](int32_t a, int32_t b) {
    return values[a] != values[b] ? values[a] > values[b] : a < b;
  });
  Boundary found = {peak, 0, mass};
  for (int32_t i = 0; i < members && found.mass < need; i++) {
    int32_t candidate = scratch.order[i];
    found.equal = values[candidate] == found.value && i > 0 ? found.equal + 1 : 1;
    found.value = values[candidate];
    found.mass += weighted ? scratch.weights[candidate] : 1.0;
  }
  return found;
}

// Where to cut the row so that its k greatest columns above -infinity stay, and what equals the last of them; k < n.
// At least k columns reach the k-th greatest of the blocks' peaks.
static float kth_greatest(const float* row, int32_t n, int32_t k, float peak, const Scratch& scratch) {
  int32_t blocks = num_blocks(n);
  float floor = -FLT_MAX;
  if (k <= blocks) {
    memcpy(scratch.peaks_copy, scratch.peaks, 4 * (size_t)blocks);
    std::nth_element(scratch.peaks_copy, scratch.peaks_copy + (k - 1), scratch.peaks_copy + blocks,
                     [](float a, float b) { return a > b; });
    floor = std::max(floor, scratch.peaks_copy[k - 1]);
  }
  int32_t count = collect(row, n, floor, scratch);
  return count <= k ? floor : boundary(count, k, peak, floor, false, scratch).value;
}

// Weights of the candidates; returns their sum.
static double weigh_candidates(int32_t count, float peak, float cold, const Scratch& scratch) {
  for (int32_t i = count; i < padded(count); i++) scratch.values[i] = -INFINITY;
  double total = 0;
  for (int32_t i = 0; i < count; i += kBlock) total += weigh(scratch.values + i, peak, cold, scratch.weights + i);
  return total;
}

}  // namespace sampling
}  // namespace zs

// Bytes of scratch that the functions below need for rows of n; 8-byte aligned.
extern "C" int64_t zs_sampling_scratch_bytes(int32_t n) { return zs::sampling::Scratch::bytes(n); }

// The token that `uniform` in [0, 1) draws, the first of the greatest where `temperature` is 0. `mask`: ceil(n / 32)
// words, or 0. `top_k` 0, `top_p` 1 and `min_offset` -infinity are off; `min_offset` is temperature * log(min_p).
// Returns -1 where every column that the mask allows is -infinity, -2 where one is NaN or +infinity.
extern "C" int32_t zs_choose(const float* row, const uint32_t* mask, int32_t n, double temperature, int32_t top_k,
                             double min_offset, double top_p, double uniform, void* memory) {
  using namespace zs::sampling;
  Scratch scratch(memory, n);
  float peak = scan(&row, mask, n, scratch);
  if (!(peak < INFINITY)) return -2;
  if (peak == -INFINITY) return -1;
  if (temperature == 0) return first_of(row, peak, scratch);

  float cold = (float)(kLog2E / temperature);
  double floor = (double)peak + min_offset;
  if (top_k > 0 && top_k < n) floor = std::max(floor, (double)kth_greatest(row, n, top_k, peak, scratch));
  bool is_whole = floor == -INFINITY;
  int32_t count = is_whole ? 0 : collect(row, n, floor, scratch);
  double total = is_whole ? weigh_row(row, n, peak, cold, scratch.sums) : weigh_candidates(count, peak, cold, scratch);

  Boundary last = {-INFINITY, n, total};
  if (top_p < 1.0) {
    if (is_whole) {
      // All columns lighter than `cut` weigh less together than what the nucleus may leave out.
      double cut = 0.5 * (1.0 - top_p) * total / n;
      if (cut >= kSmallestCut) floor = (double)peak + temperature * log(cut);
      count = collect(row, n, floor, scratch);
      weigh_candidates(count, peak, cold, scratch);
      is_whole = false;
    }
    last = boundary(count, top_p * total, peak, floor, true, scratch);
  }

  double target = uniform * last.mass, passed = 0;
  if (is_whole) {
    int32_t block = 0;
    while (block < num_blocks(n) - 1 && passed + scratch.sums[block] <= target) passed += scratch.sums[block++];
    double weights[kBlock];
    weigh(row + block * kBlock, peak, cold, weights);
    int i = 0;
    while (i < kBlock - 1 && (passed += weights[i]) <= target) i++;
    return block * kBlock + i;
  }
  int32_t drawn = -1;
  for (int32_t i = 0; i < count && passed <= target; i++) {
    float value = scratch.values[i];
    if (value < last.value || (value == last.value && last.equal-- <= 0)) continue;
    passed += scratch.weights[i];
    drawn = scratch.ids[i];
  }
  return drawn;
}

// Sum of exp(x - greatest x), and the ids of up to `num_top` greatest columns above -infinity, best first, the first of
// equals first; the ids that are missing become -1. The row must be finite or -infinity, and not all of it -infinity.
extern "C" double zs_likelihoods(const float* row, int32_t n, int32_t num_top, int32_t* ids, void* memory) {
  using namespace zs::sampling;
  Scratch scratch(memory, n);
  float peak = scan(&row, 0, n, scratch);
  if (num_top > 0) {
    int32_t count = collect(row, n, num_top < n ? kth_greatest(row, n, num_top, peak, scratch) : -INFINITY, scratch);
    for (int32_t i = 0; i < count; i++) scratch.order[i] = i;
    std::partial_sort(scratch.order, scratch.order + std::min(num_top, count), scratch.order + count,
                      [&](int32_t a, int32_t b) {
                        return scratch.values[a] != scratch.values[b] ? scratch.values[a] > scratch.values[b] : a < b;
                      });
    for (int32_t i = 0; i < num_top; i++) ids[i] = i < count ? scratch.ids[scratch.order[i]] : -1;
  }
  return weigh_row(row, n, peak, (float)kLog2E, scratch.sums);
}
