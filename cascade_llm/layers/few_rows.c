/* y = x Wᵀ + b for a few rows in bfloat16, with W in oneDNN's blocked layout; see few_rows.py, which compiles this.
 *
 * The layout, [out / 64][in / 2][64][2], puts the two inputs that one AVX512-BF16 instruction multiplies side by side,
 * for 16 outputs a vector. Every weight is read once, in order, and used for all rows; the time is that of the reading.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, LANES = 16, UNIT = 32 };

typedef uint16_t bfloat16;

static inline __m512bh broadcast_pair(const bfloat16 *pair) {
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

static inline __m512 load(const bfloat16 *x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return (__m512)_mm512_slli_epi32(wide, 16);
}

/* `vectors` * 16 outputs of `rows` rows, from `out` on; both are constants where this is called. */
static inline __attribute__((always_inline)) void outputs(const bfloat16 *x, const bfloat16 *weight,
                                                          const bfloat16 *bias, bfloat16 *y, long rows, long in_size,
                                                          long out_size, long out, int vectors) {
    const bfloat16 *w = weight + out / BLOCK * BLOCK * in_size + out % BLOCK * 2;
    __m512 sums[4][4], more[4][4]; /* two chains each, for the latency of the instruction */
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            sums[r][v] = bias ? load(bias + out + v * LANES) : _mm512_setzero_ps();
            more[r][v] = _mm512_setzero_ps();
        }
    for (long i = 0; i < in_size; i += 4)
        for (int v = 0; v < vectors; v++) {
            __m512bh first = (__m512bh)_mm512_loadu_si512(w + i * BLOCK + v * 2 * LANES);
            __m512bh second = (__m512bh)_mm512_loadu_si512(w + (i + 2) * BLOCK + v * 2 * LANES);
            for (int r = 0; r < rows; r++) {
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], first, broadcast_pair(x + r * in_size + i));
                more[r][v] = _mm512_dpbf16_ps(more[r][v], second, broadcast_pair(x + r * in_size + i + 2));
            }
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sums[r][v], more[r][v]));
            _mm256_storeu_si256((__m256i *)(y + r * out_size + out + v * LANES), (__m256i)rounded);
        }
}

/* Outputs `begin` to `end`, multiples of UNIT; whole blocks at once where they are whole. */
static inline __attribute__((always_inline)) void span(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias,
                                                       bfloat16 *y, long rows, long in_size, long out_size, long begin,
                                                       long end) {
    for (long out = begin; out < end;) {
        if (out % BLOCK == 0 && out + BLOCK <= end) {
            outputs(x, weight, bias, y, rows, in_size, out_size, out, BLOCK / LANES);
            out += BLOCK;
        } else {
            outputs(x, weight, bias, y, rows, in_size, out_size, out, UNIT / LANES);
            out += UNIT;
        }
    }
}

/* x [rows, in_size] and y [rows, out_size] contiguous; 1 to 4 rows; in_size a multiple of 4, out_size of 64. */
void few_rows_linear(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y, long rows,
                     long in_size, long out_size, int threads) {
    long units = out_size / UNIT;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long part = 0; part < threads; part++) {
        long begin = units * part / threads * UNIT, end = units * (part + 1) / threads * UNIT;
        switch (rows) {
        case 1: span(x, weight, bias, y, 1, in_size, out_size, begin, end); break;
        case 2: span(x, weight, bias, y, 2, in_size, out_size, begin, end); break;
        case 3: span(x, weight, bias, y, 3, in_size, out_size, begin, end); break;
        default: span(x, weight, bias, y, 4, in_size, out_size, begin, end); break;
        }
    }
}
