/* Planning: rows are cut into blocks, and the keys of a dear block into parts. A task is one part of one block. */
#ifndef CASCADE_NATIVE_TASKS_H
#define CASCADE_NATIVE_TASKS_H

#include <stdint.h>
#include <stdlib.h>

#include "native_packing.h"
#include "native_pieces.h"

enum {
    MAX_QUERIES = 192,   /* of a block, for one KV head */
    TASKS_PER_THREAD = 4 /* that a thread should get to choose from */
};

typedef struct {
    int64_t first_row, num_rows;
    int64_t part, num_parts;
    int64_t cost;    /* of the whole block, for one KV head */
    int64_t partial; /* where the block's states lie; used where there are parts */
} task;

/* Whether this row reads keys, on some level, that the next one reads too: then they belong in one block. */
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

#endif
