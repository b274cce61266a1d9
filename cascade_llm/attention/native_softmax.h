/* What a softmax takes beside products, for vectors: powers of 2, largest numbers, sums, tanh. */
#ifndef CASCADE_NATIVE_SOFTMAX_H
#define CASCADE_NATIVE_SOFTMAX_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_pages.h"

/* ---- the exponential ---- */

#ifdef AVX512
/* 2^x; 0 far below, NaN stays. A polynomial for the part of x behind the point: to float precision, or to 3e-6 where the
 * powers become bfloat16. */
INLINE vector power_of_2(vector x) {
    const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#ifdef PAIRS
    __m512 y = _mm512_set1_ps(1.34266843e-2f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.22424742e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.41280205e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93044845e-1f));
#else
    __m512 y = _mm512_set1_ps(1.86713007e-3f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.01703032e-3f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(5.57999131e-2f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.40164450e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.93151312e-1f));
#endif
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
    return (vector)_mm512_scalef_ps(y, (__m512)x);
}
#else
INLINE vector power_of_2(vector x) {
    vector y;
    for (int i = 0; i < LANES; i++) {
        float limited = x[i] < -126.0f ? -126.0f : x[i];
        float n = rintf(limited), f = limited - n;
        float z = 1.32647241e-3f;
        z = z * f + 9.67151287e-3f;
        z = z * f + 5.55073375e-2f;
        z = z * f + 2.40222421e-1f;
        z = z * f + 6.93146978e-1f;
        z = z * f + 1.0f;
        uint32_t bits = (uint32_t)((int32_t)(n == n ? n : 0.0f) + 127) << 23;
        float power;
        memcpy(&power, &bits, sizeof power);
        y[i] = x[i] < -126.0f ? 0.0f : z * power;
    }
    return y;
}
#endif

INLINE vector larger(vector a, vector b) {
#ifdef AVX512
    return (vector)_mm512_max_ps((__m512)a, (__m512)b);
#else
    vector y;
    for (int i = 0; i < LANES; i++) y[i] = a[i] > b[i] ? a[i] : b[i];
    return y;
#endif
}

/* ---- many vectors' largest numbers and sums ---- */

INLINE vector sum_of(vector a, vector b) { return a + b; }

/* Lane i: the numbers of x[i] joined by `join`. */
#ifdef AVX512
#define BLOCKS(a, b, order) (vector) _mm512_shuffle_f32x4((__m512)(a), (__m512)(b), order)
INLINE vector each_joined(const vector *x, vector (*join)(vector, vector)) {
    vector y[8], z[4];
    UNROLLED for (int i = 0; i < 8; i++) y[i] = join(BLOCKS(x[i], x[i + 8], 0x44), BLOCKS(x[i], x[i + 8], 0xee));
    UNROLLED for (int i = 0; i < 4; i++) z[i] = join(BLOCKS(y[i], y[i + 4], 0x88), BLOCKS(y[i], y[i + 4], 0xdd));
    UNROLLED for (int i = 0; i < 2; i++) {
        const __m512 a = (__m512)z[i], b = (__m512)z[i + 2];
        z[i] = join((vector)_mm512_unpacklo_ps(a, b), (vector)_mm512_unpackhi_ps(a, b));
    }
    const __m512 a = (__m512)z[0], b = (__m512)z[1];
    const vector joined = join((vector)_mm512_unpacklo_ps(a, b), (vector)_mm512_unpackhi_ps(a, b));
    return BLOCKS(joined, joined, 0xd8); /* blocks held x[0], x[8], x[4], x[12] and the three after each */
}
#else
INLINE vector each_joined(const vector *x, vector (*join)(vector, vector)) {
    vector column, joined = {0};
    for (int lane = 0; lane < LANES; lane++) {
        for (int i = 0; i < LANES; i++) column[i] = x[i][lane];
        joined = lane ? join(joined, column) : column;
    }
    return joined;
}
#endif

/* ---- soft caps (Gemma 2) ---- */

/* To float precision, NaN stays: e^2x - 1 = 2^n (2^f - 1) + (2^n - 1), so that small x lose nothing. */
INLINE vector hyperbolic_tangent(vector x) {
    const vector zero = {0}, rounder = zero + 12582912.0f; /* 1.5 * 2^23: a sum with it has no digits behind the point */
    vector y = -larger(zero - 60.0f, -larger(zero - 60.0f, x * 2.88539008f)); /* a NaN in the second operand stays */
    vector shifted = y + rounder, n = shifted - rounder, f = y - n;
    vector power = (vector)(((words)shifted + 127) << 23); /* 2^n */
    vector z = zero + 1.54353e-4f;
    z = z * f + 1.33335581e-3f;
    z = z * f + 9.61812911e-3f;
    z = z * f + 5.55041087e-2f;
    z = z * f + 2.40226507e-1f;
    z = z * f + 6.93147181e-1f;
    vector raised = power * (z * f) + (power - 1.0f);
    return raised / (raised + 2.0f);
}

#endif
