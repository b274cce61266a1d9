/* Cascade attention on the CPU; see native_kernels.py, which compiles this at start.
 *
 * One online softmax (Milakov and Gimelshein 2018) runs over all levels. A task is a block of neighbouring rows and one
 * KV head. It holds the block's queries, and per query the largest score so far, the sum of weights and the weighted sum
 * of values, all in float. It then walks the segments that its rows sit in, root to leaf: a shared segment is read once
 * for all rows in it, a leaf for its own rows. So levels need no merging, and K and V are read where they lie in their
 * pages. Keys go by in tiles that are packed into the order which the product wants, once per task and tile; the
 * products of pieces of a few queries and more are done in the tile registers of AMX, where there are any.
 *
 * Where the blocks are fewer than the threads can share evenly, a block's keys are cut into parts; each part is a task
 * with a state of its own, and `combine` joins these at the end.
 *
 * Built for one type of activations, one of pages, and one head size: -DBFLOAT16 -DPAGES_INT8 -DHEAD_DIM=64; see
 * native_pages.h. NaN and infinity must come through.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "native_amx.h"
#include "native_pages.h"
#include "parallel.h"

#ifdef AVX512
enum { COLUMNS = 4 };
#else
enum { COLUMNS = 2 };
#endif

enum {
    QUERIES_AT_ONCE = 6, /* times COLUMNS vectors of sums: what 32 registers hold */
    TILE = HAS_AMX ? 64 : 128, /* keys that are packed at a time; where products are fast, they and scores fit 48 KB */
    KEY_WORDS = HEAD_DIM / ELEMENTS_PER_WORD,
    /* Words and keys of a product fill tile registers, where there are any; zeros stand behind the last. */
    KEY_WIDTH = HAS_AMX ? (KEY_WORDS + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS : KEY_WORDS,
    KEYS_AT_ONCE = HAS_AMX ? 2 * AMX_ROWS : ELEMENTS_PER_WORD,
    SPARE_QUERIES = HAS_AMX ? AMX_ROWS - 1 : 0,
    AMX_QUERIES = 3, /* a piece of fewer is left to the vector registers */
    VALUE_WIDTH = (HEAD_DIM + LANES - 1) / LANES * LANES,
    MAX_QUERIES = 192,
    /* What packing a key costs, in queries that meet it. */
    PACKING = HAS_AMX ? 10 : 4,
    /* Where keys may be cut into parts, and how many tasks a thread should get to choose from. */
    CUT = 16,
    TASKS_PER_THREAD = 4
};

/* ---- what the caller hands over: the columns of a plan, see plan.py ---- */

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

/* One layer's pool. */
typedef struct {
    stored *k, *v;               /* [slots, num_kv_heads, HEAD_DIM] */
    float *k_scales, *v_scales;  /* [slots, num_kv_heads]; int8 pages only */
    float k_scale, v_scale;      /* of all that is stored; other than 1 for e4m3 pages only */
} pages;

typedef struct {
    int64_t first_row, num_rows;
    int64_t part, num_parts;
    int64_t cost;    /* of the whole block, for one KV head */
    int64_t partial; /* where the block's states lie; used where there are parts */
} task;

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

/* ---- planning: blocks of rows, and their parts ---- */

/* The coarsest level where this row shares keys with the next: they belong in one block. */
static int rows_share_keys(const plan *p, int64_t row) {
    for (int64_t depth = 0; depth < p->num_levels; depth++) {
        const level *l = p->levels + depth;
        int64_t s = segment_of_row(l, row);
        if (l->kv_page_indptr[s] < l->kv_page_indptr[s + 1] && row + 1 < l->qo_indptr[s + 1]) return 1;
    }
    return 0;
}

static int by_cost_down(const void *a, const void *b) {
    const task *x = a, *y = b;
    int64_t x_cost = x->cost / x->num_parts, y_cost = y->cost / y->num_parts;
    if (x_cost != y_cost) return x_cost < y_cost ? 1 : -1;
    if (x->first_row != y->first_row) return x->first_row < y->first_row ? -1 : 1;
    return x->part < y->part ? -1 : x->part > y->part;
}

/* States of one part of a block, in floats: weighted sums, largest scores, sums of weights. */
static int64_t state_size(const plan *p, int64_t num_rows) { return num_rows * p->num_qo_heads * (VALUE_WIDTH + 2); }

/* Cut the rows into tasks, dearest first; none shall cost less than `smallest` without need. At most `capacity` tasks,
 * which is at least the number of rows. Returns their number; partial_size: floats that partial states take. */
int64_t plan_tasks(const plan *p, int64_t threads, int64_t smallest, task *tasks, int64_t capacity,
                   int64_t *partial_size) {
    int64_t num_rows = p->levels[p->num_levels - 1].qo_indptr[p->levels[p->num_levels - 1].num_segments];
    int64_t most_rows = max(1, MAX_QUERIES / group_size(p)), total = 0, count = 0;
    const level *leaf = p->levels + p->num_levels - 1;
    for (int64_t row = 0; row < num_rows; row += most_rows)
        total += block_cost(p, row, min(most_rows, num_rows - row));
    int64_t target = max(smallest, total * p->num_kv_heads / (threads * TASKS_PER_THREAD) + 1);

    int64_t partial = 0, first = 0, leaf_segment = 0, cost = 0;
    for (int64_t row = 0; row < num_rows; row++) {
        int64_t length = row + 1 - first;
        while (leaf->qo_indptr[leaf_segment + 1] <= row) leaf_segment++;
        int last_of_sequence = leaf->qo_indptr[leaf_segment + 1] == row + 1;
        if (row + 1 < num_rows && length < most_rows) {
            if (!last_of_sequence || rows_share_keys(p, row)) continue;
            cost = block_cost(p, first, length);
            if (cost < target) continue;
        }
        cost = block_cost(p, first, length);
        int64_t parts = max(1, min((cost + target / 2) / target, threads * TASKS_PER_THREAD));
        if (parts > 1) /* an even share for every thread where all tasks are alike */
            while (parts * p->num_kv_heads % threads && parts < threads * TASKS_PER_THREAD) parts++;
        parts = min(parts, capacity - count - (num_rows - row - 1));
        for (int64_t part = 0; part < parts; part++) tasks[count++] = (task){first, length, part, parts, cost, partial};
        if (parts > 1) partial += parts * state_size(p, length);
        first = row + 1;
    }
    qsort(tasks, (size_t)count, sizeof *tasks, by_cost_down);
    *partial_size = partial;
    return count;
}

/* ---- the tiles of a task ---- */

/* Where in a piece's keys the running cost reaches `goal`: a multiple of CUT, or an end. */
static int64_t cut_at(int64_t goal, int64_t cost, const piece *x, int64_t per_key) {
    int64_t num_keys = x->end_key - x->first_key;
    if (goal <= cost) return x->first_key;
    int64_t keys = (goal - cost) / per_key;
    return keys >= num_keys ? x->end_key : x->first_key + keys / CUT * CUT;
}

/* Keys of a piece that are computed together, and where they lie for the task's head. */
typedef struct {
    piece x;
    int64_t first_key, num_keys;
    const stored *keys[TILE + 16];
} tile;

/* Goes through the tiles of a task. */
typedef struct {
    const plan *p;
    const task *t;
    const stored *pool; /* keys of the task's head */
    int64_t begin, end;  /* of the task, in cost */
    int64_t cost;        /* of the pieces so far */
    place at;
    piece x;
    int64_t next_key, end_key;
} walk;

static walk start_walk(const plan *p, const task *t, const stored *pool) {
    const int64_t begin = t->cost * t->part / t->num_parts, end = t->cost * (t->part + 1) / t->num_parts;
    return (walk){.p = p, .t = t, .pool = pool, .begin = begin, .end = end, .at = {0, -1}};
}

/* After the last tile one of no keys. */
static void next_tile(walk *w, tile *out) {
    const int64_t page_size = w->p->page_size, token = w->p->num_kv_heads * HEAD_DIM;
    out->num_keys = 0;
    while (w->next_key >= w->end_key) {
        if (!next_piece(w->p, w->t->first_row, w->t->first_row + w->t->num_rows, &w->at, &w->x)) return;
        const int64_t per_key = cost_per_key(w->p, &w->x);
        w->next_key = cut_at(w->begin, w->cost, &w->x, per_key);
        w->end_key = cut_at(w->end, w->cost, &w->x, per_key);
        w->cost += (w->x.end_key - w->x.first_key) * per_key;
    }
    out->x = w->x;
    out->first_key = w->next_key;
    out->num_keys = min(TILE, w->end_key - w->next_key);
    w->next_key += out->num_keys;
    int64_t page = out->first_key / page_size, slot = out->first_key % page_size;
    const stored *start = w->pool + w->x.pages[page] * page_size * token;
    for (long i = 0; i < out->num_keys; i++) {
        if (slot == page_size) slot = 0, start = w->pool + w->x.pages[++page] * page_size * token;
        out->keys[i] = start + slot++ * token;
    }
    for (long i = out->num_keys; i < out->num_keys + 16; i++) out->keys[i] = out->keys[i - 1];
}

/* Where the scales of a key's vector stand. */
INLINE int64_t scale_index(const pages *from, const stored *key) { return (key - from->k) / HEAD_DIM; }

/* Ask for keys [begin, end) of a tile, and their values. */
static inline void prefetch(const pages *from, const tile *x, int64_t begin, int64_t end) {
    enum { LINE = 64 / sizeof(stored) };
    const int64_t values = from->v - from->k;
    for (int64_t i = begin; i < end; i++) {
        for (int64_t d = 0; d < HEAD_DIM; d += LINE) {
            __builtin_prefetch(x->keys[i] + d);
            __builtin_prefetch(x->keys[i] + values + d);
        }
#ifdef PAGES_INT8
        __builtin_prefetch(from->k_scales + scale_index(from, x->keys[i]));
        __builtin_prefetch(from->v_scales + scale_index(from, x->keys[i]));
#endif
    }
}

/* ---- the softmax's exponential ---- */

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

/* ---- packing a tile ---- */

/* Keys as [word][key], values as [pair of keys, or key][dimension]. */
typedef struct {
    float keys[KEY_WIDTH * TILE] __attribute__((aligned(64)));
    float values[TILE / ELEMENTS_PER_WORD * VALUE_WIDTH] __attribute__((aligned(64)));
#ifdef PAGES_INT8
    float key_scales[TILE], value_scales[TILE];
#endif
} packed_tile;

/* LANES keys, LANES words: out[word * TILE + key]. */
#ifdef AVX512
INLINE void transpose_words(const stored *const *keys, long first_word, float *out) {
    __m512i r[16], t[16];
    const long left = KEY_WIDTH - first_word;
    UNROLLED for (int i = 0; i < 8; i++) {
        r[i] = (__m512i)words_at(keys[i], first_word * ELEMENTS_PER_WORD);
        r[i + 8] = (__m512i)words_at(keys[i + 8], first_word * ELEMENTS_PER_WORD);
    }
    UNROLLED for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLLED for (int i = 0; i < 8; i++) {
        /* t[i] holds words i and 8 + i of keys 0-7, t[i + 8] of keys 8-15 */
        if (i < left) _mm512_store_ps(out + i * TILE, (__m512)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        if (i + 8 < left) _mm512_store_ps(out + (i + 8) * TILE, (__m512)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}

#else
#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
INLINE void transpose_words(const stored *const *keys, long first_word, float *out) {
    vector r[8], t[8];
    const long left = KEY_WIDTH - first_word;
    UNROLLED for (int i = 0; i < 8; i++) r[i] = words_at(keys[i], first_word);
    UNROLLED for (int i = 0; i < 4; i++) {
        t[2 * i] = SHUFFLED(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[2 * i + 1] = SHUFFLED(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLLED for (int i = 0; i < 2; i++) {
        /* r[4 i + n] holds words n and 4 + n of keys 4 i to 4 i + 3 */
        r[4 * i] = SHUFFLED(t[4 * i], t[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 1] = SHUFFLED(t[4 * i], t[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[4 * i + 2] = SHUFFLED(t[4 * i + 1], t[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 3] = SHUFFLED(t[4 * i + 1], t[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        if (i < left) put_vector(out + i * TILE, SHUFFLED(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        if (i + 4 < left) put_vector(out + (i + 4) * TILE, SHUFFLED(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
}
#endif

static void pack_keys(const stored *const *keys, long num_keys, float *out) {
    for (long key = 0; key < num_keys; key += LANES) /* past the end stand repeats of the last key */
        UNROLLED for (long word = 0; word < KEY_WORDS; word += LANES)
            transpose_words(keys + key, word, out + word * TILE + key);
}

#ifdef PAIRS
static void pack_values(const stored *const *keys, int64_t values, long num_keys, float *out) {
    uint16_t order[2][32];
    for (int i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++) order[half][i] = (uint16_t)(16 * half + i / 2 + (i & 1 ? 32 : 0));
    const __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    for (long key = 0; key < num_keys; key += 2, out += VALUE_WIDTH) {
        const int is_pair = key + 1 < num_keys;
        UNROLLED for (long d = 0; d < HEAD_DIM; d += 32) {
            __m512i a = (__m512i)words_at(keys[key] + values, d);
            __m512i b = _mm512_maskz_mov_epi16(is_pair ? 0xffffffff : 0, (__m512i)words_at(keys[key + 1] + values, d));
            _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
            if (d + 16 < VALUE_WIDTH) _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
    for (long key = (num_keys + 1) & ~1; key % KEYS_AT_ONCE; key += 2, out += VALUE_WIDTH)
        memset(out, 0, VALUE_WIDTH * sizeof *out);
}
#else
static void pack_values(const stored *const *keys, int64_t values, long num_keys, float *out) {
    for (long key = 0; key < num_keys; key++, out += VALUE_WIDTH)
        UNROLLED for (long d = 0; d < VALUE_WIDTH; d += LANES) put_vector(out + d, words_at(keys[key] + values, d));
}
#endif

static void pack_tile(const pages *from, const stored *const *keys, long num_keys, packed_tile *out) {
    pack_keys(keys, num_keys, out->keys);
    pack_values(keys, from->v - from->k, num_keys, out->values);
#ifdef PAGES_INT8
    for (long key = 0; key < num_keys; key++) {
        out->key_scales[key] = from->k_scales[scale_index(from, keys[key])];
        out->value_scales[key] = from->v_scales[scale_index(from, keys[key])];
    }
    for (long key = num_keys; key < TILE; key++) out->key_scales[key] = out->value_scales[key] = 0;
#endif
}

/* ---- a block of queries ---- */

typedef struct {
    float queries[(MAX_QUERIES + SPARE_QUERIES) * KEY_WIDTH] __attribute__((aligned(64)));
    float sums[MAX_QUERIES * VALUE_WIDTH] __attribute__((aligned(64)));
    float top[MAX_QUERIES + LANES], weight[MAX_QUERIES + LANES];
    packed_tile tile;
} block;

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

static void write_result(const float *sums, float top, float weight, float v_scale, element *out, float *lse) {
    const float inverse = weight > 0 || weight != weight ? v_scale / weight : 0.0f;
    for (long d = 0; d < HEAD_DIM; d++) out[d] = store(sums[d] * inverse);
    *lse = top + log2f(weight);
}

/* States of a part: [rows, num_qo_heads, VALUE_WIDTH], then top and weight, each [rows, num_qo_heads]. */
typedef struct {
    float *sums, *top, *weight;
} state;

static state state_of(const plan *p, const task *t, int64_t part, float *partials) {
    float *base = partials + t->partial + part * state_size(p, t->num_rows);
    int64_t states = t->num_rows * p->num_qo_heads;
    return (state){base, base + states * VALUE_WIDTH, base + states * (VALUE_WIDTH + 1)};
}

/* ---- where the time goes, for measurements ---- */

/* A task walks its levels root to leaf, so the clock is looked at where the level changes. */
typedef struct {
    int64_t *level_ns; /* [num_levels], added to; NULL: no clock runs */
    int64_t since_ns, depth;
} stopwatch;

static int64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* What has passed belongs to the level so far; what follows to the one at `depth`. */
static void lap(stopwatch *s, int64_t depth) {
    if (!s->level_ns || depth == s->depth) return;
    const int64_t now = clock_ns();
    if (s->depth >= 0) __atomic_fetch_add(s->level_ns + s->depth, now - s->since_ns, __ATOMIC_RELAXED);
    s->since_ns = now, s->depth = depth;
}

static void run_task(const plan *p, const task *t, int64_t head, const pages *from, const element *q, int64_t q_stride,
                     element *out, float *lse, float *partials, int64_t *level_ns) {
    block b;
    stopwatch watch = {level_ns, 0, -1};
    const int64_t group = group_size(p), num_queries = t->num_rows * group;
    load_queries(p, &b, t, q, q_stride, head);
    memset(b.sums, 0, (size_t)(num_queries * VALUE_WIDTH) * sizeof *b.sums);
    for (int64_t i = 0; i < num_queries; i++) b.top[i] = -INFINITY, b.weight[i] = 0;

    walk w = start_walk(p, t, from->k + head * HEAD_DIM);
    tile tiles[2];
    open_amx();
    next_tile(&w, tiles);
    for (int i = 0; tiles[i].num_keys; i = 1 - i) {
        lap(&watch, tiles[i].x.depth);
        next_tile(&w, tiles + 1 - i);
        pack_tile(from, tiles[i].keys, tiles[i].num_keys, &b.tile);
        attend_tile(p, from, &b, t->first_row, tiles + i, tiles + 1 - i);
    }
    close_amx();
    for (int64_t i = 0; i < num_queries; i++) {
        const int64_t row = i / group, qo_head = head * group + i % group;
        const float *sums = b.sums + i * VALUE_WIDTH;
        if (t->num_parts == 1) {
            const int64_t at = (t->first_row + row) * p->num_qo_heads + qo_head;
            write_result(sums, b.top[i], b.weight[i], from->v_scale, out + at * HEAD_DIM, lse + at);
        } else {
            const state s = state_of(p, t, t->part, partials);
            const int64_t at = row * p->num_qo_heads + qo_head;
            memcpy(s.sums + at * VALUE_WIDTH, sums, VALUE_WIDTH * sizeof *sums);
            s.top[at] = b.top[i];
            s.weight[at] = b.weight[i];
        }
    }
    lap(&watch, -1);
}

/* Join the parts of one row, for the query heads of one KV head. */
static void combine(const plan *p, const task *t, int64_t row, int64_t kv_head, float v_scale, element *out,
                    float *lse, float *partials) {
    const int64_t group = group_size(p);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const int64_t at = row * p->num_qo_heads + head;
        float sums[VALUE_WIDTH] = {0}, top = -INFINITY, weight = 0;
        for (int64_t part = 0; part < t->num_parts; part++) {
            const state s = state_of(p, t, part, partials);
            top = s.top[at] > top ? s.top[at] : top;
        }
        for (int64_t part = 0; part < t->num_parts; part++) {
            const state s = state_of(p, t, part, partials);
            if (s.top[at] == -INFINITY && s.weight[at] == 0) continue;
            const float scale = exp2f(s.top[at] - (top == -INFINITY ? 0.0f : top));
            weight += s.weight[at] * scale;
            for (long d = 0; d < VALUE_WIDTH; d++) sums[d] += s.sums[at * VALUE_WIDTH + d] * scale;
        }
        const int64_t to = (t->first_row + row) * p->num_qo_heads + head;
        write_result(sums, top, weight, v_scale, out + to * HEAD_DIM, lse + to);
    }
}

/* One layer's attention, as all its threads see it; the arguments of `attend`. */
typedef struct {
    const plan *p;
    const task *tasks;
    const pages *from;
    const element *q;
    int64_t q_stride;
    element *out;
    float *lse, *partials;
    int64_t *level_ns;
} layer;

/* Index: a task and a KV head. */
static void attend_part(void *of, long index) {
    const layer *l = of;
    const int64_t heads = l->p->num_kv_heads;
    run_task(l->p, l->tasks + index / heads, index % heads, l->from, l->q, l->q_stride, l->out, l->lse, l->partials,
             l->level_ns);
}

/* The same index; of the tasks of a block the first one joins them. */
static void combine_part(void *of, long index) {
    const layer *l = of;
    const int64_t heads = l->p->num_kv_heads;
    const task *t = l->tasks + index / heads;
    if (t->part || t->num_parts == 1) return;
    for (int64_t row = 0; row < t->num_rows; row++)
        combine(l->p, t, row, index % heads, l->from->v_scale, l->out, l->lse, l->partials);
}

/* Attention of all rows in one layer: q [rows, num_qo_heads, HEAD_DIM] with q_stride elements from row to row; out the
 * same, contiguous; lse [rows, num_qo_heads]; partials as many floats as plan_tasks asked for. Where level_ns
 * [num_levels] is not NULL, the nanoseconds that all threads spent on each level are added to it; the joining of parts
 * is no level's. */
void attend(const plan *p, const task *tasks, int64_t num_tasks, int64_t threads, const pages *from, const element *q,
            int64_t q_stride, element *out, float *lse, float *partials, int64_t *level_ns) {
    layer l = {p, tasks, from, q, q_stride, out, lse, partials, level_ns};
    int in_parts = 0;
    for (int64_t i = 0; i < num_tasks; i++) in_parts |= tasks[i].num_parts > 1;
    parallel_for(attend_part, &l, num_tasks * p->num_kv_heads, (int)threads);
    if (in_parts) parallel_for(combine_part, &l, num_tasks * p->num_kv_heads, (int)threads);
}

/* Store k and v, [rows, num_kv_heads, HEAD_DIM] with strides from row to row, at their slots. */
void write_slots(const pages *to, const element *k, const element *v, int64_t k_stride, int64_t v_stride,
                 const int64_t *slots, int64_t num_rows, int64_t num_kv_heads) {
    for (int64_t row = 0; row < num_rows; row++) {
        const element *k_row = k + row * k_stride, *v_row = v + row * v_stride;
        const int64_t at = slots[row] * num_kv_heads; /* in vectors */
#ifdef SAME_TYPE
        memcpy(to->k + at * HEAD_DIM, k_row, (size_t)num_kv_heads * HEAD_DIM * sizeof *k);
        memcpy(to->v + at * HEAD_DIM, v_row, (size_t)num_kv_heads * HEAD_DIM * sizeof *v);
#else
        for (int64_t head = 0; head < num_kv_heads; head++) {
            const int64_t to_head = (at + head) * HEAD_DIM, from_head = head * HEAD_DIM;
            store_vector(to->k + to_head, to->k_scales + at + head, k_row + from_head, to->k_scale);
            store_vector(to->v + to_head, to->v_scales + at + head, v_row + from_head, to->v_scale);
        }
#endif
    }
}
