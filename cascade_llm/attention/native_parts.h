/* What a task ends with: the result of its rows, or, where their keys are cut into parts, a state that `combine` joins
 * with those of the other parts. */
#ifndef CASCADE_NATIVE_PARTS_H
#define CASCADE_NATIVE_PARTS_H

#include <math.h>
#include <stdint.h>

#include "native_packing.h"
#include "native_tasks.h"

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

#endif
