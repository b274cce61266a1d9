/* The tiles of a task, in order: what is packed and attended together. */
#ifndef CASCADE_NATIVE_WALK_H
#define CASCADE_NATIVE_WALK_H

#include <stdint.h>

#include "native_packing.h"
#include "native_slots.h"
#include "native_tasks.h"

/* Where keys may be cut into parts. */
enum { CUT = 16 };

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

/* Where in a piece's keys the running cost reaches `goal`: a multiple of CUT, or an end. */
static int64_t cut_at(int64_t goal, int64_t cost, const piece *x, int64_t per_key) {
    int64_t num_keys = x->end_key - x->first_key;
    if (goal <= cost) return x->first_key;
    int64_t keys = (goal - cost) / per_key;
    return keys >= num_keys ? x->end_key : x->first_key + keys / CUT * CUT;
}

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

#endif
