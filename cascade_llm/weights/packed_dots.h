/* Sums of products of codes within a block, exact in 32 bits, by the integer dot products that a level has; for
 * packed_tiles.c. */
#ifndef CASCADE_PACKED_DOTS_H
#define CASCADE_PACKED_DOTS_H

#include "packed.h"

enum { PAIR = 2 * PER_TILE /* vectors of two tiles, which the rows of one x meet together where registers are many */ };

#if IN_EIGHTS

/* The sums of `vectors` of a pair of tiles from `v0` on, over a block or the half of it, for `rows` rows of activations
 * whose codes begin at `x` and have the sums `x_sums`. Two rows meet two outputs in one instruction, and an odd row one. */
INLINE void block_dots(const piece *p, int code, const cursor *c, const uint8_t *x, const int32_t *x_sums, int half,
                       int rows, int v0, int vectors, ints whole[ROWS][PAIR]) {
    int halved = is_halved(code), first = 4 * half, last = halved ? first + 4 : STEPS, odd = rows % 2 ? rows - 1 : -1;
    int32x4_t low[ROWS][PAIR], high[ROWS][PAIR]; /* of the first and the last two of a vector's outputs, by pair of rows */
    UNROLLED for (int r = 0; r < rows; r += 2) {
        int32x4_t start = vdupq_n_s32(0);
        if (p->zero && r != odd) {
            int64_t two;
            memcpy(&two, x_sums + r, sizeof two);
            start = vmulq_n_s32(vreinterpretq_s32_s64(vdupq_n_s64(two)), -p->zero);
        }
        UNROLLED for (int v = 0; v < vectors; v++) low[r][v] = high[r][v] = start;
    }
    UNROLLED for (int s = first; s < last; s += 2) {
        uint8x16_t outputs[PAIR][2];
        UNROLLED for (int v = 0; v < vectors; v++) UNROLLED for (int j = 0; j < 2; j++)
            outputs[v][j] = (uint8x16_t)step_codes(code, vector_planes(p, c, v0 + v), s + j, p->values);
        UNROLLED for (int r = 0; r < rows; r += 2) {
            const int8_t *eight = (const int8_t *)x + place_of_code(rows, r, s * STEP);
            if (r == odd) {
                int8x16_t inputs = vcombine_s8(vld1_s8(eight), vld1_s8(eight));
                UNROLLED for (int v = 0; v < vectors; v++) {
                    low[r][v] = vusdotq_s32(low[r][v], outputs[v][0], inputs);
                    high[r][v] = vusdotq_s32(high[r][v], outputs[v][1], inputs);
                }
            } else {
                int8x16_t inputs = vld1q_s8(eight);
                UNROLLED for (int v = 0; v < vectors; v++) {
                    low[r][v] = vusmmlaq_s32(low[r][v], outputs[v][0], inputs);
                    high[r][v] = vusmmlaq_s32(high[r][v], outputs[v][1], inputs);
                }
            }
        }
    }
    UNROLLED for (int r = 0; r < rows; r += 2) UNROLLED for (int v = 0; v < vectors; v++) {
        if (r == odd) {
            whole[r][v] = (ints)vpaddq_s32(low[r][v], high[r][v]) - broadcast_int(x_sums[r] * p->zero);
        } else {
            whole[r][v] = (ints)vuzp1q_s32(low[r][v], high[r][v]);
            whole[r + 1][v] = (ints)vuzp2q_s32(low[r][v], high[r][v]);
        }
    }
}

#else

/* ---- one step: four inputs of each output; `sum` is in 16 bits where RESTARTS, and codes are signed where SIGNED_CODES
 * and they have 8 bits ---- */

#if defined(__ARM_FEATURE_DOTPROD)

enum { SIGNED_CODES = 1, RESTARTS = 0 };
typedef ints partial;
typedef struct {
    int8x16_t four_steps;
    int lane;
} inputs;
INLINE inputs inputs_of(const uint8_t *x, int s) {
    return (inputs){vld1q_s8((const int8_t *)x + s / 4 * 4 * STEP), s % 4};
}
INLINE partial dot(partial sum, bytes w, inputs x, int is_signed) {
    (void)is_signed; /* unsigned codes are below 64 */
    switch (x.lane) { /* a constant in the instruction */
    case 0: return (ints)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x.four_steps, 0);
    case 1: return (ints)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x.four_steps, 1);
    case 2: return (ints)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x.four_steps, 2);
    default: return (ints)vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)w, x.four_steps, 3);
    }
}
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }

#else

typedef int32_t inputs;
INLINE inputs inputs_of(const uint8_t *x, int s) {
    int32_t four;
    memcpy(&four, x + s * STEP, sizeof four);
    return four;
}

#if defined(AVX512)
enum { SIGNED_CODES = 0, RESTARTS = 0 };
typedef ints partial;
INLINE partial dot(partial sum, bytes w, inputs x, int is_signed) {
    (void)is_signed;
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }
#elif defined(__AVXVNNI__)
enum { SIGNED_CODES = 0, RESTARTS = 0 };
typedef ints partial;
INLINE partial dot(partial sum, bytes w, inputs x, int is_signed) {
    (void)is_signed;
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
}
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }
#elif defined(__AVX2__)
/* Products are summed in 16 bits as long as they fit, then in 32. Codes of 8 bits fill 16 bits at once, and are taken
 * as signed: |w| times x with w's sign. */
enum { SIGNED_CODES = 1, RESTARTS = 1 };
typedef int16_t partial __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
INLINE partial dot(partial sum, bytes w, inputs x, int is_signed) {
    __m256i row = _mm256_set1_epi32(x), weight = (__m256i)w;
    if (is_signed) /* the sum is 0 */
        return (partial)_mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(row, weight));
    sum += (partial)_mm256_maddubs_epi16(weight, row);
    __asm__("" : "+x"(sum)); /* GCC would keep all products, to add them in another order */
    return sum;
}
INLINE ints flush(ints sum, partial part) {
    sum += (ints)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1));
    __asm__("" : "+x"(sum)); /* as above */
    return sum;
}
#elif defined(__aarch64__)
enum { SIGNED_CODES = 1, RESTARTS = 0 };
typedef ints partial;
INLINE partial dot(partial sum, bytes w, inputs x, int is_signed) {
    (void)is_signed; /* unsigned codes are below 64; two products of signed ones fit 16 bits */
    int8x16_t weight = (int8x16_t)w, row = vreinterpretq_s8_s32(vdupq_n_s32(x));
    int16x8_t products = vmull_s8(vget_low_s8(weight), vget_low_s8(row)), more = vmull_high_s8(weight, row);
    return (ints)vpadalq_s16((int32x4_t)sum, vpaddq_s16(products, more));
}
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }
#else
enum { SIGNED_CODES = 0, RESTARTS = 0 };
typedef ints partial;
INLINE partial dot(partial sum, bytes w, inputs x, int is_signed) {
    (void)is_signed;
    words lanes = (words)w;
    for (int j = 0; j < STEP; j++) sum += (ints)(lanes >> 8 * j & 255) * (int8_t)(x >> 8 * j);
    return sum;
}
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }
#endif
#endif

/* Steps whose products fit 16 bits together, at codes of that size times 127 twice. */
INLINE int steps_in_16_bits(int code) {
    switch (code) {
    case U6: return 2;
    case U5: return 4;
    case U8: case TABLE: case HALVED_TABLE: return 1;
    default: return 8;
    }
}

/* The sums of `vectors` of a pair of tiles from `v0` on, over a block or the half of it, for `rows` rows of activations
 * whose codes begin at `x` and have the sums `x_sums`. */
INLINE void block_dots(const piece *p, int code, const cursor *c, const uint8_t *x, const int32_t *x_sums, int half,
                       int rows, int v0, int vectors, ints whole[ROWS][PAIR]) {
    int is_signed = SIGNED_CODES && is_eight(code), first = 4 * half, last = is_halved(code) ? first + 4 : STEPS;
    int zero = p->zero - (is_signed ? 128 : 0);
    partial part[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) {
        ints start = {};
        if (zero) start = broadcast_int(x_sums[r]) * -zero;
        UNROLLED for (int v = 0; v < vectors; v++) {
            whole[r][v] = start;
            if (RESTARTS) part[r][v] = (partial){};
            else part[r][v] = (partial)start;
        }
    }
    UNROLLED for (int s = first; s < last; s++) {
        bytes w[PAIR];
        UNROLLED for (int v = 0; v < vectors; v++) {
            w[v] = step_codes(code, vector_planes(p, c, v0 + v), s, p->values);
            if (is_signed) w[v] ^= 0x80;
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            inputs four = inputs_of(x + r * BLOCK, s);
            UNROLLED for (int v = 0; v < vectors; v++) part[r][v] = dot(part[r][v], w[v], four, is_signed);
        }
        if (RESTARTS && ((s - first + 1) % steps_in_16_bits(code) == 0 || s + 1 == last))
            UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) {
                whole[r][v] = flush(whole[r][v], part[r][v]);
                part[r][v] = (partial){};
            }
    }
    if (!RESTARTS)
        UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++)
            whole[r][v] = flush(whole[r][v], part[r][v]);
}

#endif
#endif
