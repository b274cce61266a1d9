/* The columns of a plan, and the segments that a block of neighbouring rows meets, root to leaf. */
#ifndef CASCADE_NATIVE_PIECES_H
#define CASCADE_NATIVE_PIECES_H

#include <stdint.h>

#include "native_amx.h"

/* What packing a key costs, in queries that meet it. */
enum { PACKING = HAS_AMX ? 10 : 4 };

/* ---- what the caller hands over: see plan.py ---- */

typedef struct {
    const int32_t *qo_indptr, *kv_page_indptr, *kv_page_indices, *kv_last_page_len;
    int64_t num_segments;
} level;

typedef struct {
    const level *levels; /* root to leaf */
    int64_t num_levels, page_size;
    int64_t window_len; /* 0: none; shared segments lie inside it, so it counts in leaves alone */
    int64_t num_qo_heads, num_kv_heads;
    double score_scale; /* times log2(e): scores are exponents of 2 from here on */
    double soft_cap;    /* likewise; a score s becomes soft_cap * tanh(s / soft_cap); 0: none */
} plan;

static inline int64_t group_size(const plan *p) { return p->num_qo_heads / p->num_kv_heads; }

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- walking the segments of a block of rows ---- */

/* Rows of a block in one segment, and the keys that any of them reads. */
typedef struct {
    int64_t first_row, end_row;
    int64_t first_key, end_key;
    const int32_t *pages;
    int64_t causal_shift; /* leaf: row r reads keys below r + causal_shift */
    int64_t window_len;   /* leaf, where there is a window: how many of them */
    int causal;
    int64_t depth; /* of its level */
} piece;

typedef struct {
    int64_t depth, segment;
} place;

static int64_t segment_of_row(const level *l, int64_t row) {
    int64_t low = 0, high = l->num_segments;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (l->qo_indptr[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

/* Tokens of the shared segments that a row sits in. */
static int64_t shared_len(const plan *p, int64_t row) {
    int64_t tokens = 0;
    for (int64_t depth = 0; depth < p->num_levels - 1; depth++) {
        const level *l = p->levels + depth;
        int64_t s = segment_of_row(l, row);
        tokens += (l->kv_page_indptr[s + 1] - l->kv_page_indptr[s]) * p->page_size;
    }
    return tokens;
}

/* The next piece of rows [first, end) at or after `at`; 0 when there is none. Start with {0, -1}. */
static int next_piece(const plan *p, int64_t first, int64_t end, place *at, piece *out) {
    for (; at->depth < p->num_levels; at->depth++, at->segment = -1) {
        const level *l = p->levels + at->depth;
        at->segment = at->segment < 0 ? segment_of_row(l, first) : at->segment + 1;
        for (; at->segment < l->num_segments && l->qo_indptr[at->segment] < end; at->segment++) {
            int64_t s = at->segment, start = l->qo_indptr[s], stop = l->qo_indptr[s + 1];
            int64_t num_pages = l->kv_page_indptr[s + 1] - l->kv_page_indptr[s];
            out->first_row = max(first, start);
            out->end_row = min(end, stop);
            if (!num_pages || out->first_row >= out->end_row) continue;
            out->pages = l->kv_page_indices + l->kv_page_indptr[s];
            out->first_key = 0;
            out->end_key = (num_pages - 1) * p->page_size + l->kv_last_page_len[s];
            out->depth = at->depth;
            out->causal = at->depth == p->num_levels - 1;
            if (out->causal) {
                out->causal_shift = out->end_key - stop + 1;
                out->end_key = out->end_row - 1 + out->causal_shift;
                if (p->window_len) {
                    out->window_len = p->window_len - shared_len(p, start);
                    out->first_key = max(0, out->first_row + out->causal_shift - out->window_len);
                }
            }
            return 1;
        }
    }
    return 0;
}

static int64_t cost_per_key(const plan *p, const piece *x) {
    return (x->end_row - x->first_row) * group_size(p) + PACKING;
}

static int64_t block_cost(const plan *p, int64_t first_row, int64_t num_rows) {
    place at = {0, -1};
    piece x;
    int64_t cost = 0;
    while (next_piece(p, first_row, first_row + num_rows, &at, &x))
        cost += (x.end_key - x.first_key) * cost_per_key(p, &x);
    return cost;
}

#endif
