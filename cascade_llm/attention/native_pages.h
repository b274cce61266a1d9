/* Numbers of activations and of pages: how they are stored, and how they become what the products of native_attention.c
 * take.
 *
 * -DBFLOAT16 or -DFLOAT32 names the activations' type, `element`; one of -DPAGES_FLOAT32, PAGES_BFLOAT16, PAGES_FLOAT16,
 * PAGES_FLOAT8 (e4m3fn) and PAGES_INT8 that of the pages, `stored`. All products are sums over words of 32 bits: a float,
 * or a pair of bfloat16 where the activations are bfloat16 and the processor multiplies those (AVX512-BF16). A number of
 * a page becomes a float, or half a pair, when it is packed; int8 and e4m3 fit a bfloat16 exactly.
 *
 * What a page can not hold: numbers beyond the largest of 8-bit floats become that one, infinity too; beyond 65,504, in
 * float16, they become NaN, so that what reads them is seen to be wrong. NaN stays.
 * An int8 vector (one token, one head) has a scale of its own, its largest magnitude / 127; where that is not finite,
 * the scale is NaN and with it all that is read.
 */
#ifndef CASCADE_NATIVE_PAGES_H
#define CASCADE_NATIVE_PAGES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define AVX512 1
#endif
#if defined(AVX512) && defined(__AVX512BF16__) && defined(BFLOAT16)
#define PAIRS 1
#endif
#if defined(AVX512) || defined(__F16C__)
#include <immintrin.h>
#endif

#ifdef PAIRS
enum { ELEMENTS_PER_WORD = 2 };
#else
enum { ELEMENTS_PER_WORD = 1 };
#endif

#ifdef AVX512
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 8")

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vector vector_at(const float *x) { return *(const vector *)x; }
INLINE void put_vector(float *x, vector value) { *(vector *)x = value; }

/* The first m of LANES or fewer. */
INLINE void put_first(int m, float *x, vector value) {
#ifdef AVX512
    _mm512_mask_storeu_ps(x, (__mmask16)((1u << m) - 1), (__m512)value);
#else
    for (int i = 0; i < m; i++) x[i] = value[i];
#endif
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* ---- numbers one by one ---- */

/* To the nearest, ties to even; a NaN stays one. */
INLINE uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

#ifdef BFLOAT16
typedef uint16_t element;
INLINE float load(element x) { return float_of((uint32_t)x << 16); }
INLINE element store(float value) { return to_bfloat16(value); }
#else
typedef float element;
INLINE float load(element x) { return x; }
INLINE element store(float value) { return value; }
#endif

#if defined(PAGES_FLOAT8)
typedef uint8_t stored;
enum { MANTISSA = 3, BIAS = 7, SIGN = 0x80, NOT_FINITE = 0x7f, STORED_NAN = 0x7f };
#define LARGEST 448.0f
#define LAST_NUMBER INFINITY /* larger ones become LARGEST */
#define SMALL_FLOAT 1
#elif defined(PAGES_FLOAT16)
typedef uint16_t stored;
enum { MANTISSA = 10, BIAS = 15, SIGN = 0x8000, NOT_FINITE = 0x7c00, STORED_NAN = 0x7e00 };
#define LARGEST 65504.0f
#define LAST_NUMBER LARGEST /* what is larger becomes NaN */
#define SMALL_FLOAT 1
#elif defined(PAGES_BFLOAT16)
typedef uint16_t stored;
#elif defined(PAGES_INT8)
typedef int8_t stored;
#else
typedef float stored;
#endif

#if defined(BFLOAT16) ? defined(PAGES_BFLOAT16) : defined(PAGES_FLOAT32)
#define SAME_TYPE 1
#endif

#ifdef SMALL_FLOAT
enum { DROPPED = 23 - MANTISSA }; /* bits of a float's mantissa that the small one has not */

/* To the nearest, ties to even. */
INLINE stored narrow(float value) {
    const uint32_t sign = bits_of(value) >> 31 ? SIGN : 0, bits = bits_of(value) & 0x7fffffff;
    const uint32_t kept = bits < bits_of(LARGEST) ? bits : bits_of(LARGEST);
    const uint32_t rounded = kept + (1u << (DROPPED - 1)) - 1 + ((kept >> DROPPED) & 1);
    const uint32_t normal = (rounded >> DROPPED) - ((uint32_t)(127 - BIAS) << MANTISSA);
    /* floats of this size lie as far apart as the small type's subnormal numbers */
    const float coarse = float_of((uint32_t)(127 + 24 - BIAS - MANTISSA) << 23);
    const uint32_t subnormal = bits_of(float_of(kept) + coarse) - bits_of(coarse);
    const uint32_t finite = kept < (uint32_t)(128 - BIAS) << 23 ? subnormal : normal;
    return (stored)(sign | (bits > bits_of(LAST_NUMBER) ? (uint32_t)STORED_NAN : finite));
}
#elif defined(PAGES_BFLOAT16)
INLINE stored narrow(float value) { return to_bfloat16(value); }
#elif !defined(PAGES_INT8)
INLINE stored narrow(float value) { return value; }
#endif

/* ---- many numbers at once ---- */

typedef stored stored_vector __attribute__((vector_size(LANES * sizeof(stored)), aligned(1), may_alias));

/* Numbers of 8 bits as 32-bit integers; compilers make single steps of a conversion that is not spelled out. */
#ifdef PAGES_INT8
#define WIDENED(name) name##epi8_epi32
#else
#define WIDENED(name) name##epu8_epi32
#endif
typedef int32_t signed_words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE words integers(stored_vector raw) {
#if (defined(PAGES_INT8) || defined(PAGES_FLOAT8)) && defined(AVX512)
    return (words)WIDENED(_mm512_cvt)((__m128i)raw);
#elif (defined(PAGES_INT8) || defined(PAGES_FLOAT8)) && defined(__AVX2__)
    long long bits;
    memcpy(&bits, &raw, sizeof bits);
    return (words)WIDENED(_mm256_cvt)(_mm_cvtsi64_si128(bits));
#else
    return (words)__builtin_convertvector(raw, signed_words);
#endif
}

/* The first `count` numbers, as floats; zeros where count is less than LANES. */
INLINE vector widen(const stored *x, const long count) {
    stored_vector raw = {0};
    if (count >= LANES) raw = *(const stored_vector *)x;
    else memcpy(&raw, x, (size_t)count * sizeof *x);
#if defined(PAGES_FLOAT16) && defined(AVX512)
    return (vector)_mm512_cvtph_ps((__m256i)raw);
#elif defined(PAGES_FLOAT16) && defined(__F16C__)
    return (vector)_mm256_cvtph_ps((__m128i)raw);
#elif defined(SMALL_FLOAT)
    const words bits = integers(raw), magnitude = bits & (SIGN - 1);
    words y = (magnitude << DROPPED) + ((uint32_t)(127 - BIAS) << 23);
    const words subnormal = (words)((vector)y * 2.0f - float_of((uint32_t)(128 - BIAS) << 23));
    const words is_normal = (words)(magnitude >= 1 << MANTISSA);
    y = (y & is_normal) | (subnormal & ~is_normal);
    y |= (words)(magnitude >= NOT_FINITE) & 0x7f800000;
    return (vector)(y | (bits & SIGN) << (8 * (4 - sizeof(stored))));
#elif defined(PAGES_BFLOAT16)
    return (vector)(__builtin_convertvector(raw, words) << 16);
#elif defined(PAGES_INT8)
    return __builtin_convertvector((signed_words)integers(raw), vector);
#else
    return __builtin_convertvector(raw, vector);
#endif
}

#ifdef PAIRS
#define FIRST(count) ((count) >= 32 ? 0xffffffff : (__mmask32)((1ull << (count)) - 1))

/* The first `count` numbers as 16 pairs of bfloat16; zeros where count is less than 32. */
INLINE __m512i widen_pairs(const stored *x, const long count) {
#if defined(PAGES_BFLOAT16)
    return _mm512_maskz_loadu_epi16(FIRST(count), x);
#elif defined(PAGES_FLOAT8)
    const __m512i bits = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(FIRST(count), x));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7f));
    /* 0 to 7 times 2^-9, the subnormal numbers, in bfloat16 */
    const __m512i small = _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    __m512i y = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16((127 - 7) << 7));
    y = _mm512_mask_permutexvar_epi16(y, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), magnitude, small);
    y = _mm512_mask_mov_epi16(y, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
    return _mm512_or_si512(y, _mm512_slli_epi16(_mm512_xor_si512(bits, magnitude), 8));
#else
    const vector low = widen(x, count), high = count > 16 ? widen(x + 16, count - 16) : (vector){0};
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#endif
}
#endif

/* The words that stand at number `first` of a vector of HEAD_DIM: LANES of them, zeros past its end. */
INLINE vector words_at(const stored *x, const long first) {
#ifdef PAIRS
    return (vector)widen_pairs(x + first, HEAD_DIM - first);
#else
    return widen(x + first, HEAD_DIM - first);
#endif
}

#endif
