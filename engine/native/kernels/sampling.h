// Chooses one token of one row of logits. engine/draw.py states the rule; both give the same token, bit for bit:
// weights are made of IEEE additions and multiplications in one order, and are then rounded to multiples of 2^-34,
// whose sums are exact in double whatever their order.
//
// Plain C++ and the compiler's own vectors on every instruction path. A row of n floats is read in blocks of 128.
#pragma once
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace zs {
namespace sampling {

constexpr int kBlock = 128;  // floats
#if defined(ZS_PATH_AVX512)
constexpr int kVector = 16;  // the compiler takes wider vectors than the machine's apart, one float at a time
constexpr int kAtOnce = 8;   // vectors that are weighed side by side; the registers hold no more
#elif defined(ZS_PATH_AVX2)
constexpr int kVector = 8;
constexpr int kAtOnce = 2;
#else
constexpr int kVector = 4;
constexpr int kAtOnce = 2;
#endif
constexpr int kSample = 1024;          // of more candidates some are looked at, to guess where a boundary lies
constexpr double kSampleErrors = 3.0;  // standard errors that the guess leaves room for
constexpr int kBlocksAtOnce = 8;
constexpr double kRounding = 393216.0;  // 1.5 * 2^18: adding it to a double below 2^17 rounds to 2^-34
constexpr double kUnit = 1.0 / (1LL << 34);
constexpr double kLog2E = 1.4426950408889634;

typedef float Floats __attribute__((vector_size(4 * kVector)));
typedef int32_t Ints __attribute__((vector_size(4 * kVector)));
typedef uint32_t Bits __attribute__((vector_size(4 * kVector)));

static inline int32_t num_blocks(int32_t n) { return (n + kBlock - 1) / kBlock; }
static inline int32_t padded(int32_t n) { return num_blocks(n) * kBlock; }

static inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
static inline Floats keep(Ints mask, Floats v) { return (Floats)(mask & (Ints)v); }  // 0 elsewhere

// The greater of the two, `b` where they are equal or one is NaN.
static inline Floats greater(Floats a, Floats b) {
#if defined(ZS_PATH_AVX512)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(ZS_PATH_AVX2)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// A mask's lane i as bit i.
static inline uint32_t bits_of(Ints mask) {
#if defined(ZS_PATH_AVX512)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(ZS_PATH_AVX2)
  return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kVector; i++) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// Bit i: whether lane i is at least `low` and at most `high`.
static inline uint32_t bits_between(Floats v, float low, float high) {
#if defined(ZS_PATH_AVX512)
  const __mmask16 is_low = _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(high), _CMP_LE_OQ);
  return _mm512_mask_cmp_ps_mask(is_low, (__m512)v, _mm512_set1_ps(low), _CMP_GE_OQ);
#else
  return bits_of((v >= low) & (v <= high));
#endif
}

// Values, and beside each its weight. The last vector is filled up with -infinity and weights of 0.
struct Set {
  const float* values;
  const float* weights;
  int32_t count;
  const float* peaks;  // the greatest value of each block, or 0
};

struct Room {
  float* values;
  float* weights;

  Set filled_up(int32_t count) const {
    for (int32_t i = count; i % kVector != 0; i++) values[i] = -INFINITY, weights[i] = 0;
    return {values, weights, count, 0};
  }
};

// What one call works with; the caller owns the memory.
struct Scratch {
  double* sums;    // (blocks) weight of each block of candidates
  float* row;      // (padded n) what may be drawn: -infinity where the mask or the padding says no; then candidates
  int32_t* ids;    // (padded n) of candidates
  float* weights;  // (padded n) of candidates
  Room rooms[2];   // (padded n)
  float* peaks;    // (blocks) greatest value of each block of the row
  float* peaks_copy;

  static int64_t bytes(int32_t n) { return 28 * (int64_t)padded(n) + 16 * (int64_t)num_blocks(n); }

  Scratch(void* memory, int32_t n) {
    const int32_t size = padded(n);
    sums = (double*)memory;
    row = (float*)(sums + num_blocks(n));
    ids = (int32_t*)(row + size);
    weights = row + 2 * size;
    rooms[0] = {row + 3 * size, row + 4 * size};
    rooms[1] = {row + 5 * size, row + 6 * size};
    peaks = row + 7 * size;
    peaks_copy = peaks + num_blocks(n);
  }
};

static inline double rounded(float weight) { return ((double)weight + kRounding) - kRounding; }

static inline uint32_t word_of(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof word);
  return word;
}

// A sum of rounded weights. What is in the low bits of a float once kCoarse is added counts multiples of 2^-17; of the
// rest, once kFine is added, multiples of 2^-34.
class Sum {
 public:
  void add(Floats weights) {
    const Floats coarse = weights + kCoarse;
    coarse_ += (Bits)coarse;
    fine_ += (Bits)((weights - (coarse - kCoarse)) + kFine);
    if (++num_added_ == kMostAdded) flush();
  }
  double value() {
    flush();
    return (double)units_ * kUnit;
  }

 private:
  static constexpr float kCoarse = 96.0f;          // 1.5 * 2^6
  static constexpr float kFine = 7.32421875e-4f;   // 1.5 * 2^-11
  static constexpr uint32_t kMostAdded = 1 << 13;  // 2^13 weights of 1 are 2^30 units of 2^-17

  void flush() {
    const Ints coarse = (Ints)(coarse_ - num_added_ * word_of(kCoarse));
    const Ints fine = (Ints)(fine_ - num_added_ * word_of(kFine));
    for (int i = 0; i < kVector; i++) units_ += ((int64_t)coarse[i] << 17) + fine[i];
    coarse_ = fine_ = Bits{};
    num_added_ = 0;
  }

  Bits coarse_ = {}, fine_ = {};
  uint32_t num_added_ = 0;
  int64_t units_ = 0;
};

// 2^((x - peak) * cold) of kBlock values, 1 for the peak. Returns their sum. Each line is done for kAtOnce vectors, for
// the lines of one vector wait for each other. Not inlined: the registers of a loop around it would be missed here.
static __attribute__((noinline)) double weigh(const float* x, float peak, float cold, float* weights) {
  Sum sum;
  for (int start = 0; start < kBlock; start += kAtOnce * kVector) {
    Floats v[kAtOnce], r[kAtOnce], y[kAtOnce];
    Bits power[kAtOnce];
#define ZS_EACH _Pragma("GCC unroll 8") for (int i = 0; i < kAtOnce; i++)
    ZS_EACH v[i] = (load(x + start + i * kVector) - peak) * cold;
    ZS_EACH v[i] = greater(v[i], Floats{} - 44.0f);
    ZS_EACH r[i] = v[i] + 12582912.0f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    ZS_EACH power[i] = ((Bits)r[i] << 23) + 0x3f800000;
    ZS_EACH r[i] = v[i] - (r[i] - 12582912.0f);
    ZS_EACH y[i] = r[i] * 1.535336188319500e-4f + 1.339887440266574e-3f;
    ZS_EACH y[i] = y[i] * r[i] + 9.618437357674640e-3f;
    ZS_EACH y[i] = y[i] * r[i] + 5.550332471162809e-2f;
    ZS_EACH y[i] = y[i] * r[i] + 2.402264791363012e-1f;
    ZS_EACH y[i] = y[i] * r[i] + 6.931472028550421e-1f;
    ZS_EACH y[i] = y[i] * r[i] + 1.0f;
    ZS_EACH y[i] = y[i] * (Floats)power[i];
    ZS_EACH store(weights + start + i * kVector, y[i]);
    ZS_EACH sum.add(y[i]);
#undef ZS_EACH
  }
  return sum.value();
}

// Weighs whole blocks of candidates, into `scratch.weights` and `scratch.sums`. Returns the weight of all.
static double weigh_all(const float* values, int32_t count, float peak, float cold, const Scratch& scratch) {
  double total = 0;
  for (int32_t block = 0; block < num_blocks(count); block++)
    total += scratch.sums[block] = weigh(values + block * kBlock, peak, cold, scratch.weights + block * kBlock);
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
      const Floats v = load(x + block * kBlock + i);
      broken |= (Bits)(v != v);
      most = greater(v, most);
    }
    scratch.peaks[block] = greatest_of(most);
    greatest = std::max(greatest, scratch.peaks[block]);
  }
  for (int i = 0; i < kVector; i++) greatest = broken[i] ? NAN : greatest;
  return greatest;
}

// Blocks with a column above -infinity.
static int32_t num_possible(int32_t n, const Scratch& scratch) {
  int32_t count = 0;
  for (int32_t block = 0; block < num_blocks(n); block++) count += scratch.peaks[block] > -INFINITY;
  return count;
}

static int32_t first_of(const float* row, float peak, const Scratch& scratch) {
  int32_t block = 0;
  while (scratch.peaks[block] != peak) block++;
  int32_t index = block * kBlock;
  while (row[index] != peak) index++;
  return index;
}

// The least float that is at least `floor` and above -infinity.
static float least_above(double floor) {
  floor = std::max(floor, (double)-FLT_MAX);
  const float least = (float)floor;
  return (double)least < floor ? nextafterf(least, INFINITY) : least;
}

#if defined(ZS_PATH_AVX2)
// The lanes that each number of 8 bits has a bit for.
struct FirstLanes {
  uint8_t lanes[256][8] = {};
  constexpr FirstLanes() {
    for (int bits = 0; bits < 256; bits++)
      for (int i = 0, count = 0; i < 8; i++)
        if (bits >> i & 1) lanes[bits][count++] = (uint8_t)i;
  }
};
constexpr FirstLanes kFirstLanes;
#endif

// Writes those lanes of `v` that `kept` has a bit for to `out`, and may write up to a vector more.
static inline void compress(Floats v, uint32_t kept, float* out) {
#if defined(ZS_PATH_AVX512)
  store(out, (Floats)_mm512_maskz_compress_ps((__mmask16)kept, (__m512)v));
#elif defined(ZS_PATH_AVX2)
  const __m128i lanes = _mm_loadl_epi64((const __m128i*)kFirstLanes.lanes[kept]);
  store(out, (Floats)_mm256_permutevar8x32_ps((__m256)v, _mm256_cvtepu8_epi32(lanes)));
#else
  for (int i = 0; kept != 0 && i < kVector; i++) {
    *out = v[i];
    out += kept >> i & 1;
  }
#endif
}

// The row's columns of at least `least` into `values`, and their ids into `ids`. Returns how many.
static int32_t collect(const float* row, int32_t n, float least, const Scratch& scratch, float* values, int32_t* ids) {
  Ints lane;
  for (int i = 0; i < kVector; i++) lane[i] = i;
  int32_t count = 0;
  for (int32_t block = 0; block < num_blocks(n); block++) {
    if (scratch.peaks[block] < least) continue;
    for (int32_t i = block * kBlock; i < (block + 1) * kBlock; i += kVector) {
      const Floats v = load(row + i);
      const uint32_t kept = bits_between(v, least, INFINITY);
      compress(v, kept, values + count);
      compress((Floats)(lane + i), kept, (float*)ids + count);
      count += __builtin_popcount(kept);
    }
  }
  return count;
}

// Which of some candidates are taken: those above `value`, and the first `equal` of that value, each of `weight`.
struct Boundary {
  float value;
  int32_t equal;
  double weight;
  double mass;  // of all that are taken
};

struct Interval {
  float low, high;  // both included
};

// The members of `from` within `kept`, in `to`. `above` receives the sum of all weights above it.
static Set split(const Set& from, Interval kept, const Room& to, double* above) {
  Sum sum;
  int32_t count = 0;
  for (int32_t start = 0; start < from.count; start += kBlock) {
    if (from.peaks != 0 && from.peaks[start / kBlock] < kept.low) continue;
    for (int32_t i = start; i < std::min(from.count, start + kBlock); i += kVector) {
      const Floats v = load(from.values + i), weights = load(from.weights + i);
      sum.add(keep(v > kept.high, weights));
      const uint32_t members = bits_between(v, kept.low, kept.high);
      compress(v, members, to.values + count);
      compress(weights, members, to.weights + count);
      count += __builtin_popcount(members);
    }
  }
  *above = sum.value();
  return to.filled_up(count);
}

static double sum_of(const Set& set) {
  Sum sum;
  for (int32_t i = 0; i < set.count; i += kVector) sum.add(load(set.weights + i));
  return sum.value();
}

// Floats as integers of the same order.
static inline int32_t key_of(float x) {
  int32_t word;
  memcpy(&word, &x, sizeof word);
  return word < 0 ? word ^ INT32_MAX : word;
}
static inline float of_key(int32_t key) {
  float x;
  key = key < 0 ? key ^ INT32_MAX : key;
  memcpy(&x, &key, sizeof x);
  return x;
}

// Whole vectors of a set, evenly spread over it, at most kSample values.
struct Sample {
  float values[kSample], weights[kSample];
  float least, greatest;
  int32_t count = 0;

  explicit Sample(const Set& set) {
    const int32_t vectors = (set.count + kVector - 1) / kVector;
    const int32_t step = (vectors * kVector + kSample - 1) / kSample * kVector;
    Floats low = Floats{} + INFINITY, high = Floats{} - INFINITY;
    for (int32_t i = 0; i < set.count; i += step, count += kVector) {
      const Floats v = load(set.values + i);
      low = -greater(-v, -low);
      high = greater(v, high);
      store(values + count, v);
      store(weights + count, load(set.weights + i));
    }
    least = -greatest_of(-low);
    greatest = greatest_of(high);
  }

  // Weight of the values up to `value`.
  float up_to(float value) const {
    Floats sum = {};
    for (int32_t i = 0; i < count; i += kVector) sum += keep(load(values + i) <= value, load(weights + i));
    float total = 0;
    for (int i = 0; i < kVector; i++) total += sum[i];
    return total;
  }

  // The value with which the weight up to it exceeds `mass`, the greatest where none does; or two values around it
  // between which lies less than `tolerance`.
  Interval where(double mass, double tolerance) const {
    int64_t low = (int64_t)key_of(least) - 1, high = key_of(greatest);
    double low_mass = 0, high_mass = INFINITY;
    while (high - low > 1 && high_mass - low_mass > tolerance) {
      const int64_t middle = (low + high) >> 1;
      const double found = up_to(of_key((int32_t)middle));
      (found > mass ? high : low) = middle;
      (found > mass ? high_mass : low_mass) = found;
    }
    return {of_key((int32_t)(low + 1)), of_key((int32_t)high)};
  }
};

// Where the member probably is below which others weigh `tail` of `total` together; nothing but time is lost where it
// is not there. What is light is summed, so that a heavy member that the sample leaves out does no harm.
static Interval guess(const Set& set, double total, double tail, bool is_wide) {
  const Sample sample(set);
  const double share = std::min(1.0, (double)sample.count / set.count);
  if (!is_wide || sample.count >= set.count) return sample.where(tail * share, 0);
  const double error = kSampleErrors * sqrt(tail * (total - tail) / sample.count);
  const double least = (tail - error) * share, most = (tail + error) * share, tolerance = 0.25 * error * share;
  const float low = least < 0 ? -FLT_MAX : sample.where(least, tolerance).low;
  const float high = sample.up_to(sample.greatest) <= most ? FLT_MAX : sample.where(most, tolerance).high;
  return {low, high};
}

// The fewest of `equal` candidates of one value that bring `above` to `need`, which all of them do.
static Boundary take(double above, double need, float value, int32_t equal, double weight) {
  int32_t taken = std::min(equal, std::max(1, (int32_t)ceil((need - above) / weight)));
  while (taken > 1 && above + (taken - 1) * weight >= need) taken--;
  while (taken < equal && above + taken * weight < need) taken++;
  return {value, taken, weight, above + taken * weight};
}

// Takes members of `from`, whose weight is `total`, greatest value first and of equal values the first ones, until
// their weight reaches `need`, above 0 and at most `total`. Overwrites `scratch.rooms`.
static Boundary boundary(Set from, double total, double need, const Scratch& scratch) {
  double above = 0;  // weight of what is greater than the members
  bool is_wide = true;
  while (from.count > 0) {
    const Room& to = scratch.rooms[from.values == scratch.rooms[0].values];
    const Interval middle = guess(from, total, above + total - need, is_wide);
    double greater, ignored;
    Set left = split(from, middle, to, &greater);
    const double between = sum_of(left);
    if (need <= above + greater) {
      left = split(from, {nextafterf(middle.high, INFINITY), FLT_MAX}, to, &ignored);
      total = greater;
    } else if (need > above + greater + between) {
      left = split(from, {-FLT_MAX, nextafterf(middle.low, -INFINITY)}, to, &ignored);
      above += greater + between;
      total -= greater + between;
    } else {
      above += greater;
      total = between;
      if (middle.low == middle.high) return take(above, need, middle.low, left.count, rounded(left.weights[0]));
    }
    is_wide = left.count <= from.count / 2;  // else one value is split off, which never fails
    from = left;
  }
  return {-INFINITY, 0, 0, above};
}

// Of the k greatest columns above -infinity the last one; all where there are no more than k.
static Boundary kth_greatest(const float* row, int32_t n, int32_t k, const Scratch& scratch) {
  const int32_t blocks = num_blocks(n);
  float least = -FLT_MAX;
  if (k <= blocks) {  // at least k columns reach the k-th greatest of the blocks' peaks
    memcpy(scratch.peaks_copy, scratch.peaks, 4 * (size_t)blocks);
    std::nth_element(scratch.peaks_copy, scratch.peaks_copy + (k - 1), scratch.peaks_copy + blocks,
                     [](float a, float b) { return a > b; });
    least = std::max(least, scratch.peaks_copy[k - 1]);
  }
  const Room& room = scratch.rooms[0];
  const int32_t count = collect(row, n, least, scratch, room.values, scratch.ids);
  if (count <= k) return {least, n, 1, (double)count};
  std::fill_n(room.weights, count, 1.0f);
  return boundary(room.filled_up(count), count, k, scratch);
}

// The candidate at which the weight of those taken so far passes `target`, below that of all of them.
static int32_t draw(const Set& set, double target, Boundary last, const Scratch& scratch) {
  double passed = 0;
  int32_t drawn = -1;
  constexpr int32_t kStep = kBlocksAtOnce * kBlock;
  for (int32_t start = 0; start < set.count; start += kStep) {
    const int32_t end = std::min(set.count, start + kStep);
    double mass = 0;
    int32_t equal = 0;
    if (last.weight == 0) {
      for (int32_t block = start / kBlock; block < num_blocks(end); block++) mass += scratch.sums[block];
    } else {
      Sum above;
      Ints is_equal = {};
      for (int32_t block = start / kBlock; block < num_blocks(end); block++) {
        if (set.peaks != 0 && set.peaks[block] < last.value) continue;
        for (int32_t i = block * kBlock; i < std::min(end, (block + 1) * kBlock); i += kVector) {
          const Floats v = load(set.values + i);
          above.add(keep(v > last.value, load(set.weights + i)));
          is_equal -= v == last.value;
        }
      }
      for (int i = 0; i < kVector; i++) equal += is_equal[i];
      equal = std::min(equal, last.equal);
      mass = above.value() + equal * last.weight;
    }
    if (passed + mass <= target) {
      passed += mass;
      last.equal -= equal;
      continue;
    }
    for (int32_t i = start; i < end && passed <= target; i++) {
      const float value = set.values[i];
      if (value < last.value || (value == last.value && last.equal-- <= 0)) continue;
      passed += rounded(set.weights[i]);
      drawn = i;
    }
    return drawn;
  }
  return drawn;
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
  const Scratch scratch(memory, n);
  const float peak = scan(&row, mask, n, scratch);
  if (!(peak < INFINITY)) return -2;
  if (peak == -INFINITY) return -1;
  if (temperature == 0) return first_of(row, peak, scratch);

  float least = least_above((double)peak + min_offset);
  if (top_k > 0 && top_k < n) least = std::max(least, kth_greatest(row, n, top_k, scratch).value);
  Set candidates = {row, scratch.weights, n, scratch.peaks};
  // Most of the row is weighed as it lies; -infinity weighs nothing.
  const bool is_whole = least == -FLT_MAX && (mask == 0 || num_possible(n, scratch) > num_blocks(n) / 2);
  if (!is_whole) {
    const int32_t count = collect(row, n, least, scratch, scratch.row, scratch.ids);  // it may read what it overwrites
    std::fill(scratch.row + count, scratch.row + padded(count), -INFINITY);
    candidates = {scratch.row, scratch.weights, count, 0};
  }
  const float cold = (float)(kLog2E / temperature);
  const double total = weigh_all(candidates.values, candidates.count, peak, cold, scratch);
  Boundary last = {-INFINITY, n, 0, total};
  if (top_p < 1.0) last = boundary(candidates, total, top_p * total, scratch);
  const int32_t drawn = draw(candidates, uniform * last.mass, last, scratch);
  return is_whole || drawn < 0 ? drawn : scratch.ids[drawn];
}

// Sum of exp(x - greatest x), and the ids of up to `num_top` greatest columns above -infinity, best first, the first of
// equals first; the ids that are missing become -1. The row must be finite or -infinity, and not all of it -infinity.
extern "C" double zs_likelihoods(const float* row, int32_t n, int32_t num_top, int32_t* ids, void* memory) {
  using namespace zs::sampling;
  const Scratch scratch(memory, n);
  const float peak = scan(&row, 0, n, scratch);
  int32_t count = 0;
  if (num_top > 0) {
    Boundary last = kth_greatest(row, n, num_top, scratch);
    for (int32_t block = 0; block < num_blocks(n); block++) {
      if (scratch.peaks[block] < last.value) continue;
      for (int32_t i = block * kBlock; i < std::min(n, (block + 1) * kBlock); i++) {
        if (row[i] > last.value || (row[i] == last.value && last.equal-- > 0)) ids[count++] = i;
      }
    }
    std::sort(ids, ids + count, [&](int32_t a, int32_t b) { return row[a] != row[b] ? row[a] > row[b] : a < b; });
    std::fill(ids + count, ids + num_top, -1);
  }
  return weigh_all(row, n, peak, (float)kLog2E, scratch);
}
