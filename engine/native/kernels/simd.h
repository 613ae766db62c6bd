// Sixteen lanes of float or int32, and the few operations the kernels need of them, once for each instruction path.
//
// NaN survives every operation here (max, exp2 and the conversions included): a broken activation must become a
// broken logit, which the sampler refuses, and never a plausible one.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(ZS_PATH_AVX512) || defined(ZS_PATH_AVX2)
#include <immintrin.h>
#elif !defined(ZS_PATH_PORTABLE)
#error "one of ZS_PATH_AVX512, ZS_PATH_AVX2 and ZS_PATH_PORTABLE must be defined"
#endif

#define ZS_INLINE static inline __attribute__((always_inline))

namespace zs {

constexpr int kLanes = 16;

// 2^r on [-0.5, 0.5]: Taylor coefficients ln(2)^k / k!, error below 2e-7.
constexpr float kExp2[7] = {1.0f,           0.69314718056f,  0.24022650696f, 0.05550410866f,
                            0.00961812911f, 0.00133335581f, 0.00015403530f};
constexpr float kExp2Min = -126.0f, kExp2Max = 127.0f;
constexpr float kSmallestPeak = 1e-30f;  // 127 / peak stays finite; a group of smaller values counts as zeros

ZS_INLINE float half_to_float(uint16_t bits) {  // IEEE binary16, every value exact
  uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff, out;
  if (rest >= 0x7c00) {
    out = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    out = sign | ((rest << 13) + 0x38000000);
  } else {
    float magnitude = (float)rest * 5.9604644775390625e-8f;  // 2^-24
    memcpy(&out, &magnitude, 4);
    out |= sign;
  }
  float value;
  memcpy(&value, &out, 4);
  return value;
}

ZS_INLINE uint16_t float_to_bf16(float value) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(ZS_PATH_AVX512)  // ------------------------------------------------------------------------------

constexpr const char* kPathName = "avx512";
constexpr int kTileRows = 6;      // rows of activations in registers at once
constexpr int kHalvesAtOnce = 2;  // halves of a weight tile in registers at once
constexpr int kKeyGroupsAtOnce = 4;

typedef __m512 F32;
typedef __m512i I32;
typedef __m512i Codes;  // 16 lanes of 4 unsigned bytes
typedef __m512i Pairs;  // 16 lanes of 2 bfloat16

ZS_INLINE F32 zero() { return _mm512_setzero_ps(); }
ZS_INLINE F32 set1(float x) { return _mm512_set1_ps(x); }
ZS_INLINE F32 load(const float* p) { return _mm512_loadu_ps(p); }
ZS_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
ZS_INLINE F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
ZS_INLINE F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
ZS_INLINE F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
ZS_INLINE F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
ZS_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// The greater of the two; `x` where either is NaN.
ZS_INLINE F32 max(F32 other, F32 x) { return _mm512_max_ps(other, x); }
ZS_INLINE F32 min(F32 other, F32 x) { return _mm512_min_ps(other, x); }
ZS_INLINE F32 keep_first(F32 x, int n, F32 other) {
  return _mm512_mask_mov_ps(other, n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1), x);
}
ZS_INLINE float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }
ZS_INLINE float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }
ZS_INLINE F32 exp2(F32 x) {
  x = min(set1(kExp2Max), max(set1(kExp2Min), x));
  F32 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  F32 rest = sub(x, whole), y = set1(kExp2[6]);
  for (int i = 5; i >= 0; i--) y = fma(y, rest, set1(kExp2[i]));
  return _mm512_scalef_ps(y, whole);
}
ZS_INLINE F32 load_half(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
ZS_INLINE void store_bf16(uint16_t* p, F32 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

ZS_INLINE I32 izero() { return _mm512_setzero_si512(); }
ZS_INLINE F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
ZS_INLINE I32 times_256(I32 x) { return _mm512_slli_epi32(x, 8); }
ZS_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
ZS_INLINE Codes low_nibbles(Codes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
ZS_INLINE Codes high_nibbles(Codes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
// sum + codes[lane][0..3] . a[0..3]; exact. `BITS` bounds the codes.
template <int BITS>
ZS_INLINE I32 dot4(I32 sum, Codes codes, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(four));
}

ZS_INLINE Pairs load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
ZS_INLINE Pairs keep_even(Pairs x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xffff)); }
// sum + pairs[lane][0] * a[0] + pairs[lane][1] * a[1].
ZS_INLINE F32 dot2(F32 sum, Pairs pairs, const uint16_t* a) {
  int32_t two;
  memcpy(&two, a, 4);
  return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(two));
}

// 32 floats to int8 of one scale: codes = round(x / scale), scale = max |x| / 127. Returns the scale, NaN
// where a value is not finite; `sums` receives the sums of the first and the second 16 codes.
ZS_INLINE float quantise32(const float* x, int8_t* codes, int32_t sums[2]) {
  F32 a = load(x), b = load(x + 16);
  F32 abs_a = _mm512_abs_ps(a), abs_b = _mm512_abs_ps(b);
  float peak = reduce_max(_mm512_max_ps(abs_a, abs_b));
  F32 infinity = set1(INFINITY);
  bool finite = (_mm512_cmp_ps_mask(abs_a, infinity, _CMP_LT_OQ) & _mm512_cmp_ps_mask(abs_b, infinity, _CMP_LT_OQ)) == 0xffff;
  F32 inverse = set1(peak > kSmallestPeak ? 127.0f / peak : 0.0f);
  __m512i ia = _mm512_cvtps_epi32(mul(a, inverse)), ib = _mm512_cvtps_epi32(mul(b, inverse));
  _mm_storeu_si128((__m128i*)codes, _mm512_cvtsepi32_epi8(ia));
  _mm_storeu_si128((__m128i*)(codes + 16), _mm512_cvtsepi32_epi8(ib));
  sums[0] = _mm512_reduce_add_epi32(ia);
  sums[1] = _mm512_reduce_add_epi32(ib);
  return finite ? peak / 127.0f : NAN;
}

// What `codes` of `scale` leave of 32 floats, in steps of scale / 256; `sums` as above.
ZS_INLINE void quantise_rest32(const float* x, const int8_t* codes, float scale, int8_t* fine, int32_t sums[2]) {
  const F32 inverse = set1(scale > kSmallestPeak ? 1.0f / scale : 0.0f);  // NaN: no steps
  for (int i = 0; i < 2; i++) {
    F32 code = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16 * i))));
    F32 rest = mul(sub(mul(load(x + 16 * i), inverse), code), set1(256.0f));
    __m512i steps = _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(rest, set1(127.0f)), set1(-127.0f)));
    _mm_storeu_si128((__m128i*)(fine + 16 * i), _mm512_cvtsepi32_epi8(steps));
    sums[i] = _mm512_reduce_add_epi32(steps);
  }
}

#elif defined(ZS_PATH_AVX2)  // --------------------------------------------------------------------------------

constexpr const char* kPathName = "avx2";
constexpr int kTileRows = 3;
constexpr int kHalvesAtOnce = 1;
constexpr int kKeyGroupsAtOnce = 1;

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};
typedef I32 Codes;
typedef I32 Pairs;

ZS_INLINE F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
ZS_INLINE F32 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
ZS_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
ZS_INLINE void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
ZS_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
ZS_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
ZS_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
ZS_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
ZS_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
ZS_INLINE F32 max(F32 other, F32 x) { return {_mm256_max_ps(other.lo, x.lo), _mm256_max_ps(other.hi, x.hi)}; }
ZS_INLINE F32 min(F32 other, F32 x) { return {_mm256_min_ps(other.lo, x.lo), _mm256_min_ps(other.hi, x.hi)}; }
ZS_INLINE F32 keep_first(F32 x, int n, F32 other) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane));
  return {_mm256_blendv_ps(other.lo, x.lo, lo), _mm256_blendv_ps(other.hi, x.hi, hi)};
}
ZS_INLINE float reduce_max(F32 x) {
  __m256 y = _mm256_max_ps(x.lo, x.hi);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ss(z, _mm_movehdup_ps(z)));
}
ZS_INLINE float reduce_add(F32 x) {
  __m256 y = _mm256_add_ps(x.lo, x.hi);
  __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
}
ZS_INLINE __m256 exp2_half(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(kExp2Max), _mm256_max_ps(_mm256_set1_ps(kExp2Min), x));
  __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 rest = _mm256_sub_ps(x, whole), y = _mm256_set1_ps(kExp2[6]);
  for (int i = 5; i >= 0; i--) y = _mm256_fmadd_ps(y, rest, _mm256_set1_ps(kExp2[i]));
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}
ZS_INLINE F32 exp2(F32 x) { return {exp2_half(x.lo), exp2_half(x.hi)}; }
ZS_INLINE F32 load_half(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
ZS_INLINE __m256i bf16_half(__m256 x) {  // as float_to_bf16, in the lower half of each lane
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), is_nan);
}
ZS_INLINE void store_bf16(uint16_t* p, F32 x) {
  const __m256i packed = _mm256_packus_epi32(bf16_half(x.lo), bf16_half(x.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}

ZS_INLINE I32 izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
ZS_INLINE F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
ZS_INLINE I32 times_256(I32 x) { return {_mm256_slli_epi32(x.lo, 8), _mm256_slli_epi32(x.hi, 8)}; }
ZS_INLINE Codes load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
ZS_INLINE __m256i low_nibbles_half(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
ZS_INLINE Codes low_nibbles(Codes x) { return {low_nibbles_half(x.lo), low_nibbles_half(x.hi)}; }
ZS_INLINE Codes high_nibbles(Codes x) {
  return {low_nibbles_half(_mm256_srli_epi16(x.lo, 4)), low_nibbles_half(_mm256_srli_epi16(x.hi, 4))};
}
// vpmaddubsw saturates at 16 bits: 4-bit codes and 7-bit halves of 8-bit codes cannot reach that.
template <int BITS>
ZS_INLINE __m256i dot4_half(__m256i sum, __m256i codes, __m256i a) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (BITS == 4) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, a), ones));
  __m256i low = _mm256_maddubs_epi16(_mm256_and_si256(codes, _mm256_set1_epi8(127)), a);
  __m256i top = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 7), _mm256_set1_epi8(1)), a);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(top, _mm256_set1_epi16(128)));
}
template <int BITS>
ZS_INLINE I32 dot4(I32 sum, Codes codes, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  __m256i x = _mm256_set1_epi32(four);
  return {dot4_half<BITS>(sum.lo, codes.lo, x), dot4_half<BITS>(sum.hi, codes.hi, x)};
}

ZS_INLINE Pairs load_pairs(const uint16_t* p) { return load_codes((const uint8_t*)p); }
ZS_INLINE Pairs keep_even(Pairs x) {
  __m256i mask = _mm256_set1_epi32(0xffff);
  return {_mm256_and_si256(x.lo, mask), _mm256_and_si256(x.hi, mask)};
}
ZS_INLINE __m256 dot2_half(__m256 sum, __m256i pairs, __m256 a0, __m256 a1) {
  __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
  return _mm256_fmadd_ps(even, a0, _mm256_fmadd_ps(odd, a1, sum));
}
ZS_INLINE F32 dot2(F32 sum, Pairs pairs, const uint16_t* a) {
  uint32_t bits[2] = {(uint32_t)a[0] << 16, (uint32_t)a[1] << 16};
  float values[2];
  memcpy(values, bits, 8);
  __m256 a0 = _mm256_set1_ps(values[0]), a1 = _mm256_set1_ps(values[1]);
  return {dot2_half(sum.lo, pairs.lo, a0, a1), dot2_half(sum.hi, pairs.hi, a0, a1)};
}

ZS_INLINE int32_t reduce_add(__m256i x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
// 32 integers as bytes, and the sums of the first and last 16.
ZS_INLINE void store_codes(const __m256i steps[4], int8_t* codes, int32_t sums[2]) {
  __m256i words = _mm256_packs_epi16(_mm256_packs_epi32(steps[0], steps[1]), _mm256_packs_epi32(steps[2], steps[3]));
  words = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256((__m256i*)codes, words);
  sums[0] = reduce_add(_mm256_add_epi32(steps[0], steps[1]));
  sums[1] = reduce_add(_mm256_add_epi32(steps[2], steps[3]));
}
ZS_INLINE float quantise32(const float* x, int8_t* codes, int32_t sums[2]) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)), infinity = _mm256_set1_ps(INFINITY);
  __m256 top = _mm256_setzero_ps();
  int finite = 0xff;
  for (int i = 0; i < 4; i++) {
    __m256 size = _mm256_and_ps(_mm256_loadu_ps(x + 8 * i), magnitude);
    finite &= _mm256_movemask_ps(_mm256_cmp_ps(size, infinity, _CMP_LT_OQ));
    top = _mm256_max_ps(top, size);
  }
  const float peak = reduce_max(F32{top, top});
  const __m256 inverse = _mm256_set1_ps(peak > kSmallestPeak ? 127.0f / peak : 0.0f);
  __m256i steps[4];
  for (int i = 0; i < 4; i++) steps[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse));
  store_codes(steps, codes, sums);
  return finite == 0xff ? peak / 127.0f : NAN;
}
ZS_INLINE void quantise_rest32(const float* x, const int8_t* codes, float scale, int8_t* fine, int32_t sums[2]) {
  const __m256 inverse = _mm256_set1_ps(scale > kSmallestPeak ? 1.0f / scale : 0.0f);
  __m256i steps[4];
  for (int i = 0; i < 4; i++) {
    __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(codes + 8 * i))));
    __m256 rest = _mm256_mul_ps(_mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), inverse), code), _mm256_set1_ps(256.0f));
    steps[i] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(rest, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f)));
  }
  store_codes(steps, fine, sums);
}

#else  // portable ---------------------------------------------------------------------------------------------

constexpr const char* kPathName = "portable";
constexpr int kTileRows = 2;
constexpr int kHalvesAtOnce = 1;
constexpr int kKeyGroupsAtOnce = 1;

#define ZS_LANES for (int i = 0; i < kLanes; i++)

struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};
struct Codes {
  uint8_t v[4 * kLanes];
};
struct Pairs {
  uint16_t v[2 * kLanes];
};

ZS_INLINE F32 set1(float x) { F32 y; ZS_LANES y.v[i] = x; return y; }
ZS_INLINE F32 zero() { return set1(0.0f); }
ZS_INLINE F32 load(const float* p) { F32 y; memcpy(y.v, p, sizeof y.v); return y; }
ZS_INLINE void store(float* p, F32 x) { memcpy(p, x.v, sizeof x.v); }
ZS_INLINE F32 add(F32 a, F32 b) { ZS_LANES a.v[i] += b.v[i]; return a; }
ZS_INLINE F32 sub(F32 a, F32 b) { ZS_LANES a.v[i] -= b.v[i]; return a; }
ZS_INLINE F32 mul(F32 a, F32 b) { ZS_LANES a.v[i] *= b.v[i]; return a; }
ZS_INLINE F32 div(F32 a, F32 b) { ZS_LANES a.v[i] /= b.v[i]; return a; }
ZS_INLINE F32 fma(F32 a, F32 b, F32 c) { ZS_LANES c.v[i] += a.v[i] * b.v[i]; return c; }
ZS_INLINE F32 max(F32 other, F32 x) { ZS_LANES x.v[i] = other.v[i] > x.v[i] ? other.v[i] : x.v[i]; return x; }
ZS_INLINE F32 min(F32 other, F32 x) { ZS_LANES x.v[i] = other.v[i] < x.v[i] ? other.v[i] : x.v[i]; return x; }
ZS_INLINE F32 keep_first(F32 x, int n, F32 other) { ZS_LANES x.v[i] = i < n ? x.v[i] : other.v[i]; return x; }
ZS_INLINE float reduce_max(F32 x) {
  float y = x.v[0];
  ZS_LANES y = y > x.v[i] ? y : x.v[i];
  return y;
}
ZS_INLINE float reduce_add(F32 x) {
  float y = 0;
  ZS_LANES y += x.v[i];
  return y;
}
ZS_INLINE F32 exp2(F32 x) {
  x = min(set1(kExp2Max), max(set1(kExp2Min), x));
  F32 y = set1(kExp2[6]);
  int32_t whole[kLanes];
  ZS_LANES {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer; a NaN stays one and takes any exponent.
    float rounded = (x.v[i] + 12582912.0f) - 12582912.0f;
    whole[i] = rounded == rounded ? (int32_t)rounded : 0;
    x.v[i] -= rounded;
  }
  for (int k = 5; k >= 0; k--) y = fma(y, x, set1(kExp2[k]));
  ZS_LANES {
    uint32_t bits = (uint32_t)(whole[i] + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    y.v[i] *= power;
  }
  return y;
}
ZS_INLINE F32 load_half(const uint8_t* p) {
  uint16_t bits[kLanes];
  memcpy(bits, p, sizeof bits);
  F32 y;
  ZS_LANES y.v[i] = half_to_float(bits[i]);
  return y;
}
ZS_INLINE void store_bf16(uint16_t* p, F32 x) { ZS_LANES p[i] = float_to_bf16(x.v[i]); }

ZS_INLINE I32 izero() { I32 y; ZS_LANES y.v[i] = 0; return y; }
ZS_INLINE F32 to_float(I32 x) { F32 y; ZS_LANES y.v[i] = (float)x.v[i]; return y; }
ZS_INLINE I32 times_256(I32 x) { ZS_LANES x.v[i] *= 256; return x; }
ZS_INLINE Codes load_codes(const uint8_t* p) { Codes y; memcpy(y.v, p, sizeof y.v); return y; }
ZS_INLINE Codes low_nibbles(Codes x) { for (int i = 0; i < 4 * kLanes; i++) x.v[i] &= 15; return x; }
ZS_INLINE Codes high_nibbles(Codes x) { for (int i = 0; i < 4 * kLanes; i++) x.v[i] >>= 4; return x; }
template <int BITS>
ZS_INLINE I32 dot4(I32 sum, Codes codes, const int8_t* a) {
  ZS_LANES for (int k = 0; k < 4; k++) sum.v[i] += (int32_t)codes.v[4 * i + k] * a[k];
  return sum;
}

ZS_INLINE Pairs load_pairs(const uint16_t* p) { Pairs y; memcpy(y.v, p, sizeof y.v); return y; }
ZS_INLINE Pairs keep_even(Pairs x) { ZS_LANES x.v[2 * i + 1] = 0; return x; }
ZS_INLINE float bf16_to_float(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
ZS_INLINE F32 dot2(F32 sum, Pairs pairs, const uint16_t* a) {
  float a0 = bf16_to_float(a[0]), a1 = bf16_to_float(a[1]);
  ZS_LANES sum.v[i] = (sum.v[i] + bf16_to_float(pairs.v[2 * i + 1]) * a1) + bf16_to_float(pairs.v[2 * i]) * a0;
  return sum;
}
#undef ZS_LANES

ZS_INLINE float quantise32(const float* x, int8_t* codes, int32_t sums[2]) {
  float peak = 0;
  bool finite = true;
  for (int i = 0; i < 32; i++) {
    float magnitude = fabsf(x[i]);
    finite &= magnitude < INFINITY;
    peak = magnitude > peak ? magnitude : peak;
  }
  if (!finite) {
    memset(codes, 0, 32);
    sums[0] = sums[1] = 0;
    return NAN;
  }
  float inverse = peak > kSmallestPeak ? 127.0f / peak : 0.0f;
  int32_t rounded[32];
  for (int i = 0; i < 32; i++) {
    // As in exp2: to nearest, ties to even.
    float code = (x[i] * inverse + 12582912.0f) - 12582912.0f;
    code = code > 127.0f ? 127.0f : code < -127.0f ? -127.0f : code;
    rounded[i] = (int32_t)code;
  }
  sums[0] = sums[1] = 0;
  for (int i = 0; i < 32; i++) {
    codes[i] = (int8_t)rounded[i];
    sums[i / 16] += rounded[i];
  }
  return peak / 127.0f;
}

ZS_INLINE void quantise_rest32(const float* x, const int8_t* codes, float scale, int8_t* fine, int32_t sums[2]) {
  const float inverse = scale > kSmallestPeak ? 1.0f / scale : 0.0f;  // NaN: no steps
  int32_t rounded[32];
  for (int i = 0; i < 32; i++) {
    float rest = (x[i] * inverse - (float)codes[i]) * 256.0f;
    rest = rest > 127.0f ? 127.0f : rest > -127.0f ? rest : -127.0f;
    rounded[i] = (int32_t)((rest + 12582912.0f) - 12582912.0f);
  }
  sums[0] = sums[1] = 0;
  for (int i = 0; i < 32; i++) {
    fine[i] = (int8_t)rounded[i];
    sums[i / 16] += rounded[i];
  }
}
#endif

}  // namespace zs
