// Vectors of the unit's width, LANES floats, and the few operations that C++ has no sign for.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PANEL = 16;              // outputs of a panel
constexpr int PARTS = PANEL / LANES;   // vectors of a panel
constexpr int GROUP = 32;              // inputs that share a scale

#define INLINE inline __attribute__((always_inline))
// A loop of a known number of rounds, written out: what it fills stays in registers.
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < count; ++i)

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));
typedef uint32_t U __attribute__((vector_size(4 * LANES)));
typedef uint16_t H __attribute__((vector_size(2 * LANES)));

template <class T>
INLINE T load_as(const void* from) {
    T to;
    memcpy(&to, from, sizeof to);
    return to;
}

template <class T, class S>
INLINE T bits(S from) {
    static_assert(sizeof(T) == sizeof(S), "of one size");
    return load_as<T>(&from);
}

INLINE V load(const float* from) { return load_as<V>(from); }
INLINE void store(float* to, V v) { memcpy(to, &v, sizeof v); }
INLINE V all(float x) { return x - V{}; }
INLINE U all_bits(uint32_t x) { return x - U{}; }

INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

INLINE V larger(V a, V b) { return a > b ? a : b; }

// Sums in one order: halves are added until one is left.
INLINE float sum(V v) {
    float x[LANES];
    store(x, v);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

// Of two vectors end to end, the numbers at even places (FIRST 0) or at odd ones (1).
template <int FIRST>
INLINE V alternate(V a, V b) {
#if defined(__AVX512F__)
    I places;
    for (int i = 0; i < LANES; ++i) places[i] = 2 * i + FIRST;
    return (V)_mm512_permutex2var_ps((__m512)a, (__m512i)places, (__m512)b);
#elif defined(__AVX2__)
    __m256 mixed = _mm256_shuffle_ps((__m256)a, (__m256)b, FIRST ? 0xdd : 0x88);
    return (V)_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8);
#else
    return FIRST ? (V)vuzp2q_f32((float32x4_t)a, (float32x4_t)b) : (V)vuzp1q_f32((float32x4_t)a, (float32x4_t)b);
#endif
}

// Lane i: the sum of vector i. Neighbours are added until one is left.
INLINE V sums_of(V (&v)[LANES]) {
#pragma GCC unroll 4
    for (int count = LANES / 2; count > 0; count /= 2)
        EACH(i, count)
            v[i] = alternate<0>(v[2 * i], v[2 * i + 1]) + alternate<1>(v[2 * i], v[2 * i + 1]);
    return v[0];
}

INLINE float largest(V v) {
    float best = v[0];
    for (int i = 1; i < LANES; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

INLINE V from_half(const uint16_t* from) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
    return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    return (V)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#endif
}

INLINE void to_half(uint16_t* to, V v) {
#if defined(__AVX512F__)
    __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &half, sizeof half);
#elif defined(__AVX2__)
    __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &half, sizeof half);
#else
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#endif
}

INLINE V from_brain(const uint16_t* from) {
#if defined(__AVX512F__)
    return bits<V>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(from)), 16));
#endif
    return bits<V>(__builtin_convertvector(load_as<H>(from), U) << 16);
}

INLINE U brain_bits(V v) {  // rounded to even; NaN stays NaN
    U u = bits<U>(v);
    U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return v == v ? rounded : (u >> 16) | 0x40;
}

// Numbers of a kind in memory, and rounded to it.
struct F32 {
    typedef float T;
    static INLINE V load(const T* from) { return load_as<V>(from); }
    static INLINE void store(T* to, V v) { memcpy(to, &v, sizeof v); }
    static INLINE V round(V v) { return v; }
};

struct BF16 {
    typedef uint16_t T;
    static INLINE V load(const T* from) { return from_brain(from); }
    static INLINE void store(T* to, V v) {
        H h = __builtin_convertvector(brain_bits(v), H);
        memcpy(to, &h, sizeof h);
    }
    static INLINE V round(V v) { return bits<V>(brain_bits(v) << 16); }
};

struct F16 {
    typedef uint16_t T;
    static INLINE V load(const T* from) { return from_half(from); }
    static INLINE void store(T* to, V v) { to_half(to, v); }
    static INLINE V round(V v) {
        uint16_t half[LANES];
        to_half(half, v);
        return from_half(half);
    }
};

// The first n of LANES numbers; zeros behind them.
template <class K>
INLINE V load_some(const typename K::T* from, int64_t n) {
    if (n >= LANES) return K::load(from);
    typename K::T some[LANES] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = from[i];
    return K::load(some);
}

template <class K>
INLINE void store_some(typename K::T* to, V v, int64_t n) {
    if (n >= LANES) return K::store(to, v);
    typename K::T some[LANES];
    K::store(some, v);
    for (int64_t i = 0; i < n; ++i) to[i] = some[i];
}

// e to the x, within 2 units in the last place; 0 far below, infinity far above, NaN of NaN.
INLINE V exponential(V x) {
    const V magic = all(12582912.0f);
    V inside = x < all(-87.3f) ? all(-87.3f) : x;
    inside = inside > all(88.7f) ? all(88.7f) : inside;
    V shifted = fma(inside, all(1.44269504f), magic);
    V whole = shifted - magic;
    V r = fma(whole, all(-0.693145752f), inside);
    r = fma(whole, all(-1.42860677e-6f), r);
    V p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    // In two factors: 2^128 alone is no float.
    I power = bits<I>(shifted) - bits<I>(magic), half = power >> 1;
    V scaled = p * bits<V>((half + 127) << 23) * bits<V>((power - half + 127) << 23);
    scaled = x < all(-87.3f) ? all(0.0f) : scaled;
    scaled = x > all(88.72f) ? all(HUGE_VALF) : scaled;
    return x == x ? scaled : x;
}

// Sums over the inputs of a group in each lane, four at a time, added to `to`; exact, whatever
// computes them. `code` holds 0 … 15, x -127 … 127. total_int4 makes one number of two sums.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Of two inputs in 16 bits: eight times 2 · 15 · 127 fit.
INLINE I dot_int4(I to, U code, U x) {
#if defined(__AVX512BW__)
    return (I)_mm512_add_epi16((__m512i)to, _mm512_maddubs_epi16((__m512i)code, (__m512i)x));
#else
    return (I)_mm256_add_epi16((__m256i)to, _mm256_maddubs_epi16((__m256i)code, (__m256i)x));
#endif
}

INLINE I add_pairs(I a) {
#if defined(__AVX512BW__)
    return (I)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1));
#else
    return (I)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1));
#endif
}

INLINE I total_int4(I low, I high) {
    typedef int16_t Pairs __attribute__((vector_size(4 * LANES)));
    return add_pairs((I)((Pairs)low + (Pairs)high));
}
#else
INLINE I dot_int4(I to, U code, U x) {
#if defined(__AVX512VNNI__)
    return (I)_mm512_dpbusd_epi32((__m512i)to, (__m512i)code, (__m512i)x);
#elif defined(__ARM_FEATURE_DOTPROD)
    return (I)vdotq_s32((int32x4_t)to, (int8x16_t)code, (int8x16_t)x);
#else
    for (int shift = 0; shift < 32; shift += 8)
        to += (I(code << (24 - shift)) >> 24) * (I(x << (24 - shift)) >> 24);
    return to;
#endif
}

INLINE I total_int4(I low, I high) { return low + high; }
#endif

// The same for signed codes, -128 … 127, if sums start with INT8_OFFSET times the sum of all x.
#if defined(__AVX512VNNI__)
constexpr int INT8_OFFSET = -128;
INLINE I dot_int8(I to, U code, U x) { return dot_int4(to, code ^ 0x80808080u, x); }
#elif defined(__AVX512BW__)
constexpr int INT8_OFFSET = 0;
INLINE I dot_int8(I to, U code, U x) {
    __mmask64 negative = _mm512_movepi8_mask((__m512i)code);
    __m512i turned = _mm512_mask_sub_epi8((__m512i)x, negative, __m512i{}, (__m512i)x);
    return to + add_pairs((I)_mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)code), turned));
}
#elif defined(__AVX2__)
constexpr int INT8_OFFSET = 0;
INLINE I dot_int8(I to, U code, U x) {  // 2 · 128 · 127 fit in 16 bits, without signs of codes
    __m256i turned = _mm256_sign_epi8((__m256i)x, (__m256i)code);
    return to + add_pairs((I)_mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)code), turned));
}
#else
constexpr int INT8_OFFSET = 0;
INLINE I dot_int8(I to, U code, U x) { return dot_int4(to, code, x); }
#endif

}  // namespace
