/* y = x Wᵀ + b in bfloat16, with W in oneDNN's blocked layout; see blocked.py, which compiles this.
 *
 * The layout, [out / block][in / 2][block][2] with blocks of 64 or 32 outputs, puts the two inputs that one AVX512-BF16
 * instruction multiplies side by side, for 16 outputs a vector. Every weight is read from memory once, in order, and used
 * for all rows.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "parallel.h"

enum { WIDE = 64, LANES = 16, UNIT = 32, ROW_BLOCK = 6 };

typedef uint16_t bfloat16;

/* Where the first pairs of outputs from `out` on lie, in blocks of `block` outputs. */
static inline const bfloat16 *first_pairs(const bfloat16 *weight, long in_size, long out, long block) {
    return weight + out / block * block * in_size + out % block * 2;
}

/* The pairs of inputs `i` and `i + 1` for the `v`th vector of outputs from there on; `v` and `block` are constants. */
static inline __attribute__((always_inline)) __m512bh pairs_at(const bfloat16 *w, long in_size, long i, int v, int block) {
    return (__m512bh)_mm512_loadu_si512(w + v * LANES / block * block * in_size + i * block + v * LANES % block * 2);
}

static inline __m512bh broadcast_pair(const bfloat16 *pair) {
    int32_t bits;
    memcpy(&bits, pair, sizeof bits);
    return (__m512bh)_mm512_set1_epi32(bits);
}

static inline __m512 load(const bfloat16 *x) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x));
    return (__m512)_mm512_slli_epi32(wide, 16);
}

/* `vectors` * 16 outputs of 1 to 4 rows, from `out` on, whose time is that of the reading; `vectors`, `rows` and `block`
 * are constants where this is called. */
static inline __attribute__((always_inline)) void outputs(const bfloat16 *x, const bfloat16 *weight,
                                                          const bfloat16 *bias, bfloat16 *y, long rows, long in_size,
                                                          long out_size, long out, int vectors, int block) {
    const bfloat16 *w = first_pairs(weight, in_size, out, block);
    __m512 sums[4][4], more[4][4]; /* two chains each, for the latency of the instruction */
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            sums[r][v] = bias ? load(bias + out + v * LANES) : _mm512_setzero_ps();
            more[r][v] = _mm512_setzero_ps();
        }
    for (long i = 0; i < in_size; i += 4)
        for (int v = 0; v < vectors; v++) {
            __m512bh first = pairs_at(w, in_size, i, v, block), second = pairs_at(w, in_size, i + 2, v, block);
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

/* Outputs `begin` to `end`, multiples of UNIT; WIDE at once where they are. */
static inline __attribute__((always_inline)) void span(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias,
                                                       bfloat16 *y, long rows, long in_size, long out_size, long begin,
                                                       long end, int block) {
    for (long out = begin; out < end;) {
        if (out % WIDE == 0 && out + WIDE <= end) {
            outputs(x, weight, bias, y, rows, in_size, out_size, out, WIDE / LANES, block);
            out += WIDE;
        } else {
            outputs(x, weight, bias, y, rows, in_size, out_size, out, UNIT / LANES, block);
            out += UNIT;
        }
    }
}

/* The same for a block of up to ROW_BLOCK rows: 24 sums, 4 vectors of weights and a pair of inputs are what the
 * registers hold, and 24 independent sums are more than the instruction's latency asks for. Meanwhile `ahead` lines are
 * asked for in each round, from `next` on. */
static inline __attribute__((always_inline)) void tile(const bfloat16 *x, const bfloat16 *w, const bfloat16 *bias,
                                                       bfloat16 *y, long rows, long in_size, long out_size, int vectors,
                                                       int block, const bfloat16 *next, int ahead) {
    __m512 sums[ROW_BLOCK][4];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) sums[r][v] = bias ? load(bias + v * LANES) : _mm512_setzero_ps();
    for (long i = 0; i < in_size; i += 2) {
        __m512bh weights[4];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) weights[v] = pairs_at(w, in_size, i, v, block);
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
                                                            int vectors, int block, const bfloat16 *next, int ahead) {
    switch (rows) {
    case 1: tile(x, w, bias, y, 1, in_size, out_size, vectors, block, next, ahead); break;
    case 2: tile(x, w, bias, y, 2, in_size, out_size, vectors, block, next, ahead); break;
    case 3: tile(x, w, bias, y, 3, in_size, out_size, vectors, block, next, ahead); break;
    case 4: tile(x, w, bias, y, 4, in_size, out_size, vectors, block, next, ahead); break;
    case 5: tile(x, w, bias, y, 5, in_size, out_size, vectors, block, next, ahead); break;
    default: tile(x, w, bias, y, 6, in_size, out_size, vectors, block, next, ahead); break;
    }
}

/* As `span`, for more rows: WIDE outputs' weights are read from the cache for all of them, while the next come from
 * memory, a part of their lines with each block of rows. */
static inline __attribute__((always_inline)) void span_of_many(const bfloat16 *x, const bfloat16 *weight,
                                                               const bfloat16 *bias, bfloat16 *y, long rows, long in_size,
                                                               long out_size, long begin, long end, int block) {
    long groups = (rows + ROW_BLOCK - 1) / ROW_BLOCK, ahead = groups == 1 ? 4 : groups < 4 ? 2 : 1;
    for (long out = begin; out < end;) {
        int whole = out % WIDE == 0 && out + WIDE <= end;
        long after = out + (whole ? WIDE : UNIT);
        const bfloat16 *w = first_pairs(weight, in_size, out, block);
        const bfloat16 *later = after % WIDE == 0 && after < end ? weight + after * in_size : 0;
        for (long group = 0; group < groups; group++) {
            long first = rows * group / groups, last = rows * (group + 1) / groups;
            int asks = later && (group + 1) * ahead <= WIDE / LANES ? ahead : 0;
            const bfloat16 *next = asks ? later + group * ahead * in_size * LANES : 0;
            const bfloat16 *own_bias = bias ? bias + out : 0;
            if (whole)
                row_block(x + first * in_size, w, own_bias, y + first * out_size + out, last - first, in_size, out_size,
                          WIDE / LANES, block, next, asks);
            else
                row_block(x + first * in_size, w, own_bias, y + first * out_size + out, last - first, in_size, out_size,
                          UNIT / LANES, block, next, asks);
        }
        out = after;
    }
}

#if defined(__AMX_BF16__)
#include "blocked_tiles.h"
#endif

/* The arguments of `blocked_product`, as all its threads see them. */
typedef struct {
    const bfloat16 *x, *weight, *bias;
    bfloat16 *y;
    long rows, in_size, out_size, block, parts;
} product;

/* One of `parts` even spans of the outputs. */
static inline __attribute__((always_inline)) void part_of(const product *p, long part, int block) {
    const long units = p->out_size / UNIT, rows = p->rows, in_size = p->in_size, out_size = p->out_size;
    const long begin = part_begin(units, part, p->parts) * UNIT, end = part_begin(units, part + 1, p->parts) * UNIT;
#if defined(__AMX_BF16__)
    if (rows > 2 && in_size % DEPTH == 0) { /* reading the weights is the time of one row and of two */
        span_of_tiles(p->x, p->weight, p->bias, p->y, rows, in_size, out_size, begin, end, block);
        return;
    }
#endif
    switch (rows) {
    case 1: span(p->x, p->weight, p->bias, p->y, 1, in_size, out_size, begin, end, block); break;
    case 2: span(p->x, p->weight, p->bias, p->y, 2, in_size, out_size, begin, end, block); break;
    case 3: span(p->x, p->weight, p->bias, p->y, 3, in_size, out_size, begin, end, block); break;
    case 4: span(p->x, p->weight, p->bias, p->y, 4, in_size, out_size, begin, end, block); break;
    default: span_of_many(p->x, p->weight, p->bias, p->y, rows, in_size, out_size, begin, end, block); break;
    }
}

static void part_of_blocks_of_64(void *product, long part) { part_of(product, part, 64); }
static void part_of_blocks_of_32(void *product, long part) { part_of(product, part, 32); }

/* x [rows, in_size] and y [rows, out_size] contiguous; in_size a multiple of 4, out_size of 64; block 64 or 32. */
void blocked_product(const bfloat16 *x, const bfloat16 *weight, const bfloat16 *bias, bfloat16 *y, long rows,
                     long in_size, long out_size, long block, int threads) {
    product p = {x, weight, bias, y, rows, in_size, out_size, block, threads};
    parallel_for(block == 64 ? part_of_blocks_of_64 : part_of_blocks_of_32, &p, threads, threads);
}
