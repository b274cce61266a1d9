/* The two ends of a block of experts, see routing.py: rows are ordered by expert, and their outputs are summed again.
 *
 * Built for one element type: -DBFLOAT16 or, without it, float. Arithmetic is in float, one rounding at the end.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "parallel.h"

#ifdef BFLOAT16
typedef uint16_t element;

static inline float load(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even; a NaN stays one. */
static inline element store(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    return (element)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}
#else
typedef float element;
static inline float load(element x) { return x; }
static inline element store(float value) { return value; }
#endif

enum {
    CHUNK = 256,          /* values that are summed at a time */
    PARALLEL_FROM = 65536 /* values, from which a second thread pays for its start */
};

/* The largest logits of a row, in `weights`, and their experts; of equal ones the lower expert comes first. Whatever is
 * no number is chosen only where there is nothing else. */
static void choose(const element *logits, long experts, long chosen, int64_t *ids, float *weights) {
    long count = 0;
    for (long expert = 0; expert < experts; expert++) {
        float logit = load(logits[expert]);
        if (count == chosen && !(logit > weights[count - 1])) continue;
        long at = count < chosen ? count++ : count - 1;
        for (; at > 0 && weights[at - 1] < logit; at--) weights[at] = weights[at - 1], ids[at] = ids[at - 1];
        weights[at] = logit, ids[at] = expert;
    }
}

/* Logits become their share of the softmax over all experts, or over the chosen. */
static void weigh(const element *logits, long experts, long chosen, int divides_by_sum, float *weights) {
    float largest = weights[0], sum = 0;
    if (!divides_by_sum)
        for (long expert = 0; expert < experts; expert++) sum += expf(load(logits[expert]) - largest);
    for (long j = 0; j < chosen; j++) {
        weights[j] = expf(weights[j] - largest);
        if (divides_by_sum) sum += weights[j];
    }
    for (long j = 0; j < chosen; j++) weights[j] /= sum;
}

/* logits [rows, experts]; sources [rows * chosen], ends [experts], places and weights [rows, chosen]; `starts` is memory
 * for `experts` numbers. */
void route_rows(const element *logits, long rows, long experts, long chosen, int divides_by_sum, int64_t *sources,
                int32_t *ends, int64_t *places, float *weights, int64_t *starts) {
    memset(ends, 0, experts * sizeof *ends);
    for (long row = 0; row < rows; row++) {
        const element *own = logits + row * experts;
        choose(own, experts, chosen, places + row * chosen, weights + row * chosen);
        weigh(own, experts, chosen, divides_by_sum, weights + row * chosen);
        for (long j = 0; j < chosen; j++) ends[places[row * chosen + j]]++;
    }
    int32_t end = 0;
    for (long expert = 0; expert < experts; expert++) {
        starts[expert] = end;
        ends[expert] = end += ends[expert];
    }
    for (long copy = 0; copy < rows * chosen; copy++) {
        int64_t place = starts[places[copy]]++;
        sources[place] = copy / chosen;
        places[copy] = place;
    }
}

/* The arguments of `combine_rows`, as all its threads see them. */
typedef struct {
    const element *outputs;
    const int64_t *places;
    const float *weights;
    element *out;
    long rows, chosen, size, parts;
} sums;

static void sum_part(void *of, long part) {
    const sums *s = of;
    for (long row = part_begin(s->rows, part, s->parts); row < part_begin(s->rows, part + 1, s->parts); row++)
        for (long first = 0; first < s->size; first += CHUNK) {
            long count = s->size - first < CHUNK ? s->size - first : CHUNK;
            float total[CHUNK] = {0};
            for (long j = row * s->chosen; j < (row + 1) * s->chosen; j++) {
                const element *own = s->outputs + s->places[j] * s->size + first;
                float weight = s->weights[j];
                for (long i = 0; i < count; i++) total[i] += weight * load(own[i]);
            }
            element *out = s->out + row * s->size + first;
            for (long i = 0; i < count; i++) out[i] = store(total[i]);
        }
}

/* out [rows, size]: the sums of outputs[places] [rows, chosen, size] times weights. */
void combine_rows(const element *outputs, const int64_t *places, const float *weights, element *out, long rows,
                  long chosen, long size, int threads) {
    const long parts = rows * chosen * size >= PARALLEL_FROM ? threads : 1;
    sums s = {outputs, places, weights, out, rows, chosen, size, parts};
    parallel_for(sum_part, &s, parts, threads);
}
