/* y = x Wᵀ + b in bfloat16, with W in oneDNN's blocked layout; see blocked.py, which compiles this.
 *
 * The layout, [out / 64][in / 2][64][2], puts the two inputs that one AVX512-BF16 instruction multiplies side by side,
 * for 16 outputs a vector. Every weight is read from memory once, in order, and used for all rows.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "parallel.h"

enum { BLOCK = 64, LANES = 16, UNIT = 32, ROW_BLOCK = 6 };

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

/* `vectors` * 16 outputs of 1 to 4 rows, from `out` on, whose time is that of the reading; `vectors` and `rows` are
 * constants where this is called. */
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

/* The same for a block of up to ROW_BLOCK rows: 24 sums, 4 vectors of weights and a pair of inputs are what the
 * registers hold, and 24 independent sums are more than the instruction's latency asks for. Meanwhile `ahead` lines are
 * asked for in each round, from `next` on. */
static inline __attribute__((always_inline)) void tile(const bfloat16 *x, const bfloat16 *w, const bfloat16 *bias,
                                                       bfloat16 *y, long rows, long in_size, long out_size, int vectors,
                                                       const bfloat16 *next, int ahead) {
    __m512 sums[ROW_BLOCK][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[r][v] = bias ? load(bias + v * LANES) : _mm512_setzero_ps();
    for (long i = 0; i < in_size; i += 2) {
        __m512bh weights[4];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) weights[v] = (__m512bh)_mm512_loadu_si512(w + i * BLOCK + v * 2 * LANES);
        for (int line = 0; line < ahead; line++, next += 2 * LANES) _mm_prefetch((const char *)next, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            __m512bh pair = broadcast_pair(x + r * in_size + i);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], weights[v], pair);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            _mm256_storeu_si256((__m256i *)(y + r * out_size + v * LANES), (__m256i)_mm512_cvtneps_pbh(sums[r][v]));
}

static inline __attribute__((always_inline)) void row_block(const bfloat16 *x, const bfloat16 *w, const bfloat16 *bias,
                                                            bfloat16 *y, long rows, long in_size, long out_size,
                                                            int vectors, const bfloat16 *next, int ahead) {
    switch (rows) {
    case 1: tile(x, w, bias, y, 1, in_size, out_size, vectors, next, ahead); break;
    case 2: tile(x, w, bias, y, 2, in_size, out_size, vectors, next, ahead); break;
    case 3: tile(x, w, bias, y, 3, in_size, out_size, vectors, next, ahead); break;
    case 4: tile(x, w, bias, y, 4, in_size, out_size, vectors, next, ahead); break;
    case 5: tile(x, w, bias, y, 5, in_size, out_size, vectors, next, ahead); break;
    default: tile(x, w, bias, y, 6, in_size, out_size, vectors, next, ahead); break;
    }
}

/* As `span`, for more rows: a block of weights is read from the cache for all of them, while the next one comes from
 * memory, a part of its lines with each block of rows. */
static void span_of_many(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y, long rows,
                         long in_size, long out_size, long begin, long end) {
    long blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK, ahead = blocks == 1 ? 4 : blocks < 4 ? 2 : 1;
    for (long out = begin; out < end;) {
        int whole = out % BLOCK == 0 && out + BLOCK <= end;
        long after = out + (whole ? BLOCK : UNIT);
        const bfloat16 *w = weight + out / BLOCK * BLOCK * in_size + out % BLOCK * 2;
        const bfloat16 *later = after % BLOCK == 0 && after < end ? weight + after * in_size : 0;
        for (long block = 0; block < blocks; block++) {
            long first = rows * block / blocks, last = rows * (block + 1) / blocks;
            int asks = later && (block + 1) * ahead <= BLOCK / LANES ? ahead : 0;
            const bfloat16 *next = asks ? later + block * ahead * in_size * LANES : 0;
            const bfloat16 *own_bias = bias ? bias + out : 0;
            if (whole)
                row_block(x + first * in_size, w, own_bias, y + first * out_size + out, last - first, in_size, out_size,
                          BLOCK / LANES, next, asks);
            else
                row_block(x + first * in_size, w, own_bias, y + first * out_size + out, last - first, in_size, out_size,
                          UNIT / LANES, next, asks);
        }
        out = after;
    }
}

/* The arguments of `blocked_product`, as all its threads see them. */
typedef struct {
    const bfloat16 *x, *weight, *bias;
    bfloat16 *y;
    long rows, in_size, out_size, parts;
} product;

/* One of `parts` even spans of the outputs. */
static void product_part(void *of, long part) {
    const product *p = of;
    const long units = p->out_size / UNIT, rows = p->rows, in_size = p->in_size, out_size = p->out_size;
    const long begin = part_begin(units, part, p->parts) * UNIT, end = part_begin(units, part + 1, p->parts) * UNIT;
    switch (rows) {
    case 1: span(p->x, p->weight, p->bias, p->y, 1, in_size, out_size, begin, end); break;
    case 2: span(p->x, p->weight, p->bias, p->y, 2, in_size, out_size, begin, end); break;
    case 3: span(p->x, p->weight, p->bias, p->y, 3, in_size, out_size, begin, end); break;
    case 4: span(p->x, p->weight, p->bias, p->y, 4, in_size, out_size, begin, end); break;
    default: span_of_many(p->x, p->weight, p->bias, p->y, rows, in_size, out_size, begin, end); break;
    }
}

/* x [rows, in_size] and y [rows, out_size] contiguous; in_size a multiple of 4, out_size of 64. */
void blocked_product(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y, long rows,
                     long in_size, long out_size, int threads) {
    product p = {x, weight, bias, y, rows, in_size, out_size, threads};
    parallel_for(product_part, &p, threads, threads);
}
