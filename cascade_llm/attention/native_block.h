/* A block of queries with its running softmax (Milakov and Gimelshein 2018), and what a tile of keys adds to it. */
#ifndef CASCADE_NATIVE_BLOCK_H
#define CASCADE_NATIVE_BLOCK_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_amx.h"
#include "native_packing.h"
#include "native_softmax.h"
#include "native_walk.h"

#ifdef AVX512
enum { COLUMNS = 4 };
#else
enum { COLUMNS = 2 };
#endif

enum {
    QUERIES_AT_ONCE = 6, /* times COLUMNS vectors of sums: what 32 registers hold */
    SPARE_QUERIES = HAS_AMX ? AMX_ROWS - 1 : 0,
    AMX_QUERIES = 3 /* a piece of fewer is left to the vector registers */
};

typedef struct {
    float queries[(MAX_QUERIES + SPARE_QUERIES) * KEY_WIDTH] __attribute__((aligned(64)));
    float sums[MAX_QUERIES * VALUE_WIDTH] __attribute__((aligned(64)));
    float top[MAX_QUERIES + LANES], weight[MAX_QUERIES + LANES];
    packed_tile tile;
} block;

static void load_queries(const plan *p, block *b, const task *t, const element *q, int64_t q_stride, int64_t head) {
    const int64_t group = group_size(p);
    if (SPARE_QUERIES)
        memset(b->queries, 0, (size_t)((t->num_rows * group + SPARE_QUERIES) * KEY_WIDTH) * sizeof *b->queries);
    for (int64_t row = 0; row < t->num_rows; row++)
        for (int64_t i = 0; i < group; i++) {
            const element *from = q + (t->first_row + row) * q_stride + (head * group + i) * HEAD_DIM;
            float *to = b->queries + (row * group + i) * KEY_WIDTH;
#ifdef PAIRS
            memcpy(to, from, HEAD_DIM * sizeof *from);
#else
            for (long d = 0; d < HEAD_DIM; d++) to[d] = load(from[d]);
#endif
        }
}

/* ---- the product of words ---- */

/* sum + a * b, where a is one word for all lanes. */
INLINE vector multiply_add(vector sum, float a, vector b) {
#ifdef PAIRS
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(a), (__m512bh)b);
#else
    return sum + a * b;
#endif
}

/* c[i, :] = c[i, :] * keep[i] + sum over k of a[i, k] b[k, :], for m rows and n vectors; keep NULL forgets c. */
INLINE void product(const int m, const int n, float *c, long c_stride, const float *a, long a_stride, const float *b,
                    long b_stride, long depth, const float *keep) {
    vector sum[QUERIES_AT_ONCE][COLUMNS];
    UNROLLED for (int i = 0; i < m; i++) {
        UNROLLED for (int j = 0; j < n; j++) {
            if (keep) sum[i][j] = vector_at(c + i * c_stride + j * LANES) * keep[i];
            else sum[i][j] = (vector){0};
        }
    }
    for (long k = 0; k < depth; k++) {
        vector columns[COLUMNS];
        UNROLLED for (int j = 0; j < n; j++) columns[j] = vector_at(b + k * b_stride + j * LANES);
        UNROLLED for (int i = 0; i < m; i++) {
            float x = a[i * a_stride + k];
            UNROLLED for (int j = 0; j < n; j++) sum[i][j] = multiply_add(sum[i][j], x, columns[j]);
        }
    }
    UNROLLED for (int i = 0; i < m; i++) {
        UNROLLED for (int j = 0; j < n; j++) put_vector(c + i * c_stride + j * LANES, sum[i][j]);
    }
}

/* ---- a tile of keys ---- */

/* What a product becomes before its exponential: multiplied, with a cap after tanh(product * inner). */
typedef struct {
    float scale, inner; /* inner 0: no cap */
} scoring;

/* Scores of m queries, at most LANES or AMX_ROWS, with the first `num_keys` keys of the tile become weights: 2^(score -
 * top), with the queries' tops and weights kept up to date. Query i sees keys low[i] to high[i] (NULL: all); what stands
 * behind num_keys, up to `padded`, weighs nothing. A query's weights stand where its scores stood. Lane i of the result
 * is what earlier sums of query i must be multiplied by. */
INLINE vector weigh(const int m, block *b, long first, long num_keys, long padded, scoring by, const int *low,
                    const int *high, float (*scores)[TILE]) {
    vector rows[LANES] = {{0}};
#ifdef PAGES_INT8
    for (int i = 0; i < m; i++)
        for (long k = 0; k < padded; k += LANES)
            put_vector(scores[i] + k, vector_at(scores[i] + k) * vector_at(b->tile.key_scales + k));
#endif
    if (by.inner)
        for (int i = 0; i < m; i++)
            for (long k = 0; k < padded; k += LANES)
                put_vector(scores[i] + k, hyperbolic_tangent(vector_at(scores[i] + k) * by.inner));
    if (high || num_keys < padded) {
        for (int i = 0; i < m; i++) {
            for (long k = 0; low && k < low[i]; k++) scores[i][k] = -INFINITY;
            for (long k = high ? high[i] : num_keys; k < padded; k++) scores[i][k] = -INFINITY;
        }
    }
    for (int i = 0; i < m; i++) {
        rows[i] = vector_at(scores[i]);
        for (long k = LANES; k < padded; k += LANES) rows[i] = larger(rows[i], vector_at(scores[i] + k));
    }
    const vector before = vector_at(b->top + first), found = each_joined(rows, larger) * by.scale;
    const vector now = larger(found, before); /* a NaN in the second operand stays: there is none */
    const vector top = (vector)((words)now & (words)(now != -INFINITY)); /* no key yet: all weights become 2^-inf */
    float tops[LANES];
    put_vector(tops, top);
    for (int i = 0; i < m; i++) {
        rows[i] = (vector){0};
        for (long k = 0; k < padded; k += 2 * LANES) {
            vector even = power_of_2(vector_at(scores[i] + k) * by.scale - tops[i]);
            vector odd = power_of_2(vector_at(scores[i] + k + LANES) * by.scale - tops[i]);
            rows[i] += even + odd;
#ifdef PAGES_INT8
            even *= vector_at(b->tile.value_scales + k);
            odd *= vector_at(b->tile.value_scales + k + LANES);
#endif
#ifdef PAIRS
            *(__m512bh *)(scores[i] + k / 2) = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
#else
            put_vector(scores[i] + k, even);
            put_vector(scores[i] + k + LANES, odd);
#endif
        }
    }
    const vector change = power_of_2(before - top);
    put_first(m, b->top + first, now);
    put_first(m, b->weight + first, vector_at(b->weight + first) * change + each_joined(rows, sum_of));
    return change;
}

/* m queries against the first `num_keys` keys of the tile; query i sees keys low[i] to high[i] (NULL: all). */
INLINE void attend_queries(const int m, block *b, long first, long num_keys, scoring by, const int *low,
                           const int *high) {
    float scores[QUERIES_AT_ONCE][TILE] __attribute__((aligned(64)));
    float change[LANES];
    const long width = COLUMNS * LANES, padded = (num_keys + width - 1) / width * width;
    for (long column = 0; column < padded; column += width)
        product(m, COLUMNS, scores[0] + column, TILE, b->queries + first * KEY_WIDTH, KEY_WIDTH,
                b->tile.keys + column, TILE, KEY_WORDS, NULL);
    put_vector(change, weigh(m, b, first, num_keys, padded, by, low, high, scores));
    const long depth = (num_keys + ELEMENTS_PER_WORD - 1) / ELEMENTS_PER_WORD;
    float *sums = b->sums + first * VALUE_WIDTH;
    for (long column = 0; column + width <= VALUE_WIDTH; column += width)
        product(m, COLUMNS, sums + column, VALUE_WIDTH, scores[0], TILE, b->tile.values + column, VALUE_WIDTH, depth,
                change);
    if (VALUE_WIDTH % width) {
        const long column = VALUE_WIDTH / width * width;
        product(m, VALUE_WIDTH % width / LANES, sums + column, VALUE_WIDTH, scores[0], TILE, b->tile.values + column,
                VALUE_WIDTH, depth, change);
    }
}

/* The same for up to 16 queries. Products always have 16 rows: those past the queries' end come to nothing. */
static void attend_amx(int m, block *b, long first, long num_keys, scoring by, const int *low, const int *high) {
    float scores[AMX_ROWS][TILE] __attribute__((aligned(64)));
    float found[AMX_ROWS][VALUE_WIDTH] __attribute__((aligned(64)));
    float change[LANES];
    const long padded = (num_keys + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE * KEYS_AT_ONCE;
    amx_product(scores[0], TILE, b->queries + first * KEY_WIDTH, KEY_WIDTH, b->tile.keys, TILE, KEY_WIDTH, padded);
    put_vector(change, weigh(m, b, first, num_keys, padded, by, low, high, scores));
    amx_product(found[0], VALUE_WIDTH, scores[0], TILE, b->tile.values, VALUE_WIDTH, padded / ELEMENTS_PER_WORD,
                VALUE_WIDTH);
    for (int i = 0; i < m; i++)
        for (long d = 0; d < VALUE_WIDTH; d += LANES) {
            float *sum = b->sums + (first + i) * VALUE_WIDTH + d;
            put_vector(sum, vector_at(sum) * change[i] + vector_at(found[i] + d));
        }
}

#define ATTEND(m)                                                                                               \
    static void attend_##m(block *b, long first, long num_keys, scoring by, const int *low, const int *high) {  \
        attend_queries(m, b, first, num_keys, by, low, high);                                                   \
    }
ATTEND(1)
ATTEND(2)
ATTEND(3)
ATTEND(4)
ATTEND(5)
ATTEND(6)

typedef void (*attend_function)(block *, long, long, scoring, const int *, const int *);
static const attend_function ATTEND_BY_COUNT[] = {NULL, attend_1, attend_2, attend_3, attend_4, attend_5, attend_6};

/* All queries of a piece against its packed tile, while the next tile comes into the cache. */
static void attend_tile(const plan *p, const pages *from, block *b, int64_t block_row, const tile *now,
                        const tile *next) {
    const piece *x = &now->x;
    const double scale = p->score_scale * from->k_scale;
    const scoring by = p->soft_cap ? (scoring){(float)p->soft_cap, (float)(scale / p->soft_cap)}
                                   : (scoring){(float)scale, 0.0f};
    const int64_t first_key = now->first_key, num_keys = now->num_keys;
    const long group = group_size(p), first = (x->first_row - block_row) * group, end = (x->end_row - block_row) * group;
    const int by_amx = HAS_AMX && end - first >= AMX_QUERIES, at_once = by_amx ? AMX_ROWS : QUERIES_AT_ONCE;
    const long rounds = (end - first + at_once - 1) / at_once;
    const int masked =
        x->causal && (first_key + num_keys > x->first_row + x->causal_shift ||
                      (p->window_len && first_key < x->end_row - 1 + x->causal_shift - x->window_len));
    for (long round = 0, query = first; round < rounds; round++) {
        prefetch(from, next, next->num_keys * round / rounds, next->num_keys * (round + 1) / rounds);
        const int count = (int)((end - query + rounds - round - 1) / (rounds - round));
        int low[AMX_ROWS], high[AMX_ROWS];
        long seen = num_keys;
        if (masked) {
            seen = 0;
            for (int i = 0; i < count; i++) {
                int64_t limit = block_row + (query + i) / group + x->causal_shift;
                high[i] = (int)max(0, min(num_keys, limit - first_key));
                low[i] = p->window_len ? (int)max(0, min(num_keys, limit - x->window_len - first_key)) : 0;
                if (low[i] < high[i]) seen = max(seen, high[i]);
            }
        }
        if (seen && by_amx) attend_amx(count, b, query, seen, by, masked ? low : NULL, masked ? high : NULL);
        else if (seen) ATTEND_BY_COUNT[count](b, query, seen, by, masked ? low : NULL, masked ? high : NULL);
        query += count;
    }
}

#endif
