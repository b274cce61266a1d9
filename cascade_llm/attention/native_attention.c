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
 * In the order of a call: native_pieces.h has the columns of a plan and the walk over its segments, native_tasks.h
 * `plan_tasks`, native_walk.h the tiles of a task, native_packing.h their packing, native_block.h the queries and their
 * softmax, native_parts.h the joining of parts; native_slots.h has the pool and `write_slots`. Python calls these two
 * and `attend`, below.
 *
 * Built for one type of activations, one of pages, and one head size: -DBFLOAT16 -DPAGES_INT8 -DHEAD_DIM=64; see
 * native_pages.h. NaN and infinity must come through.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "native_amx.h"
#include "native_block.h"
#include "native_packing.h"
#include "native_parts.h"
#include "native_slots.h"
#include "native_tasks.h"
#include "native_walk.h"
#include "parallel.h"

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

/* ---- one task, then all ---- */

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

/* A step's plan, shared out; partials hold as many floats as plan_tasks asked for. Whoever calls `attend` again with the
 * same address may have put another step's there. */
typedef struct {
    const plan *p;
    const task *tasks;
    int64_t num_tasks, threads;
    float *partials;
} shared_out;

/* Attention of all rows in one layer: q [rows, num_qo_heads, HEAD_DIM] with q_stride elements from row to row; out the
 * same, contiguous; lse [rows, num_qo_heads]. Where level_ns [num_levels] is not NULL, the nanoseconds that all threads
 * spent on each level are added to it; the joining of parts is no level's. */
void attend(const shared_out *step, const pages *from, const element *q, int64_t q_stride, element *out, float *lse,
            int64_t *level_ns) {
    layer l = {step->p, step->tasks, from, q, q_stride, out, lse, step->partials, level_ns};
    int in_parts = 0;
    for (int64_t i = 0; i < step->num_tasks; i++) in_parts |= step->tasks[i].num_parts > 1;
    const int64_t num_parts = step->num_tasks * step->p->num_kv_heads;
    parallel_for(attend_part, &l, num_parts, (int)step->threads);
    if (in_parts) parallel_for(combine_part, &l, num_parts, (int)step->threads);
}
