/* Rounds weights to codes of 4 bits with scales and minima of 6, GGUF's Q4_K; see quantize.py, which calls this.
 *
 * A super-block is 256 weights: 8 groups of 32. A lane of a vector is a group, so no sum runs across lanes. A group's scale and minimum are searched: codes are found on grids of several sizes, and for
 * each the scale and minimum of the least weighted squared error. A large weight counts more, as its input does in the
 * products that matter.
 *
 * Super-blocks are rounded until they stay as they are: 6 bits may leave a grid that the search would not choose. */
#include <math.h>

#include "parallel.h"
#include "vectors.h"

enum {
    GROUP = 32,
    GROUPS = 8,
    SUPER = GROUP * GROUPS,
    UNIT = LANES > GROUPS ? LANES : GROUPS, /* groups that are rounded together */
    VECTORS = UNIT / LANES,
    TOGETHER = UNIT / GROUPS, /* super-blocks */
    MAX_CODE = 15,
    MAX_SUB = 63,
    MAX_ROUNDS = 16,
    SHARE = 64 /* units that a thread takes at a time */
};

#define EACH_LANE for (int lane = 0; lane < LANES; lane++)

INLINE floats chosen(ints mask, floats yes, floats no) { return (floats)(((ints)yes & mask) | ((ints)no & ~mask)); }
INLINE floats smaller(floats a, floats b) { return chosen(a < b, a, b); }
INLINE floats larger(floats a, floats b) { return chosen(a > b, a, b); }
/* To the nearest integer, of numbers up to 2**22. */
INLINE floats rounded(floats x) { return (x + 12582912.0f) - 12582912.0f; }
/* x / y, and 0 where y is 0. */
INLINE floats quotient(floats x, floats y) { return (floats)((ints)(x / y) & (y != 0)); }

/* The sums of a group over its weights x and their importance w. */
typedef struct {
    floats weight, linear, square, goal, mixed; /* w, w c, w c c, w x, w c x */
} sums;

/* A grid: code c is the value c * scale + minimum. */
typedef struct {
    floats scale, minimum, error;
} grid;

/* The scale and minimum that come closest with these codes; neither has the wrong sign. */
INLINE grid least_squares(const sums *s) {
    floats zero = {}, determinant = s->weight * s->square - s->linear * s->linear;
    floats scale = (s->weight * s->mixed - s->linear * s->goal) / determinant;
    floats minimum = (s->square * s->goal - s->linear * s->mixed) / determinant;
    ints has_both = (determinant > 0) & (minimum <= 0);
    scale = chosen(has_both, scale, quotient(s->mixed, s->square));
    return (grid){larger(scale, zero), chosen(has_both, minimum, zero), zero};
}

INLINE void keep_better(grid *best, const grid *other) {
    ints is_better = other->error < best->error;
    best->scale = chosen(is_better, other->scale, best->scale);
    best->minimum = chosen(is_better, other->minimum, best->minimum);
    best->error = chosen(is_better, other->error, best->error);
}

/* The best grid of weights x, on which the largest is tried at several codes and the smallest at 0. */
static grid searched(const floats x[GROUP], const float *ends, long num_ends) {
    floats low = {}, high = x[0], square = {}, importance[GROUP];
    sums s = {};
    for (int i = 0; i < GROUP; i++) {
        low = smaller(x[i], low);
        high = larger(x[i], high);
        square += x[i] * x[i];
    }
    EACH_LANE square[lane] = sqrtf(square[lane] / GROUP);
    for (int i = 0; i < GROUP; i++) {
        importance[i] = square + larger(x[i], -x[i]);
        s.weight += importance[i];
        s.goal += importance[i] * x[i];
    }
    grid best = {{}, low, broadcast(INFINITY)};
    for (long end = 0; end < num_ends; end++) {
        floats codes[GROUP], most = broadcast(MAX_CODE);
        grid spanning = {larger((high - low) / broadcast(ends[end]), (floats){}), low, {}};
        floats inverse = quotient(broadcast(1), spanning.scale);
        s.linear = s.square = s.mixed = (floats){};
        for (int i = 0; i < GROUP; i++) {
            floats code = smaller(rounded((x[i] - low) * inverse), most), weighted = importance[i] * code;
            s.linear += weighted;
            s.square += weighted * code;
            s.mixed += weighted * x[i];
            codes[i] = code;
        }
        grid fitted = least_squares(&s);
        for (int i = 0; i < GROUP; i++) {
            floats first = codes[i] * spanning.scale + (spanning.minimum - x[i]);
            floats second = codes[i] * fitted.scale + (fitted.minimum - x[i]);
            spanning.error += importance[i] * first * first;
            fitted.error += importance[i] * second * second;
        }
        keep_better(&best, &spanning);
        keep_better(&best, &fitted);
    }
    return best;
}

/* The nearest float16, ties to even, of a number that is not negative; infinity beyond. */
static uint16_t to_float16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (bits >= 0x7f800000) return bits > 0x7f800000 ? 0x7e00 : 0x7c00;
    if (bits >= 0x477ff000) return 0x7c00;
    if (bits < 0x38800000) { /* subnormal: in steps of 2**-24 */
        float shifted = x + 0.5f;
        memcpy(&bits, &shifted, sizeof bits);
        return (uint16_t)(bits - 0x3f000000);
    }
    return (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

static float of_float16(uint16_t x) {
    float value;
    uint32_t bits = (uint32_t)x << 13;
    memcpy(&value, &bits, sizeof value);
    return x >= 0x7c00 ? (x > 0x7c00 ? NAN : INFINITY) : value * 0x1p112f;
}

/* What the super-blocks of a unit are rounded to. */
typedef struct {
    uint16_t super_scales[TOGETHER], super_minima[TOGETHER];
    floats sub_scales[VECTORS], sub_minima[VECTORS];
    floats codes[VECTORS][GROUP], values[VECTORS][GROUP]; /* values: what the codes stand for */
} rounded_unit;

/* Numbers of groups, none negative, as a float16 of their super-block times 0 to 63; they become the products. */
static void by_sixty_three(floats numbers[VECTORS], uint16_t supers[TOGETHER], floats subs[VECTORS]) {
    float *of_group = (float *)numbers, spread[UNIT];
    for (int s = 0; s < TOGETHER; s++) {
        float largest = 0;
        for (int g = 0; g < GROUPS; g++) largest = fmaxf(largest, of_group[s * GROUPS + g]);
        supers[s] = to_float16(largest / MAX_SUB);
        for (int g = 0; g < GROUPS; g++) spread[s * GROUPS + g] = of_float16(supers[s]);
    }
    for (int v = 0; v < VECTORS; v++) {
        floats super = *(const floats *)(spread + v * LANES);
        subs[v] = smaller(rounded(quotient(numbers[v], super)), broadcast(MAX_SUB));
        numbers[v] = super * subs[v];
    }
}

static void round_once(const floats x[VECTORS][GROUP], const float *ends, long num_ends, rounded_unit *out) {
    floats scales[VECTORS], shifts[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        grid found = searched(x[v], ends, num_ends);
        scales[v] = found.scale;
        shifts[v] = larger(-found.minimum, (floats){}); /* no negative zero */
    }
    by_sixty_three(scales, out->super_scales, out->sub_scales);
    by_sixty_three(shifts, out->super_minima, out->sub_minima);
    for (int v = 0; v < VECTORS; v++)
        for (int i = 0; i < GROUP; i++) {
            floats steps = larger(quotient(x[v][i] + shifts[v], scales[v]), (floats){});
            out->codes[v][i] = rounded(smaller(steps, broadcast(MAX_CODE)));
            out->values[v][i] = out->codes[v][i] * scales[v] - shifts[v]; /* a product is exact: 4, 11 and 6 bits */
        }
}

/* Whether finite numbers of `a` have become others in `b`; what is infinite is an error, which Python finds. */
static int differ(const floats a[VECTORS][GROUP], const floats b[VECTORS][GROUP]) {
    ints any = {};
    for (int v = 0; v < VECTORS; v++)
        for (int i = 0; i < GROUP; i++) any |= (a[v][i] != b[v][i]) & (a[v][i] - a[v][i] == 0);
    int32_t found = 0;
    EACH_LANE found |= any[lane];
    return found != 0;
}

typedef struct {
    const float *values, *ends;
    long count, num_ends;
    uint8_t *codes;
    uint16_t *super_scales, *super_minima;
    int8_t *sub_scales, *sub_minima;
} rounding;

/* The super-blocks of one unit, from `first` on. */
static void round_unit(const rounding *t, long first) {
    long count = t->count - first < TOGETHER ? t->count - first : TOGETHER;
    floats x[VECTORS][GROUP] = {};
    rounded_unit found, again;
    for (int g = 0; g < count * GROUPS; g++)
        for (int i = 0; i < GROUP; i++) x[g / LANES][i][g % LANES] = t->values[first * SUPER + g * GROUP + i];
    round_once(x, t->ends, t->num_ends, &found);
    for (int turn = 0; turn < MAX_ROUNDS; turn++) {
        round_once(found.values, t->ends, t->num_ends, &again);
        if (!differ(found.values, again.values)) break;
        found = again;
    }
    for (int g = 0; g < count * GROUPS; g++) {
        t->sub_scales[first * GROUPS + g] = (int8_t)found.sub_scales[g / LANES][g % LANES];
        t->sub_minima[first * GROUPS + g] = (int8_t)found.sub_minima[g / LANES][g % LANES];
        for (int i = 0; i < GROUP; i++)
            t->codes[first * SUPER + g * GROUP + i] = (uint8_t)found.codes[g / LANES][i][g % LANES];
    }
    for (int s = 0; s < count; s++) {
        t->super_scales[first + s] = found.super_scales[s];
        t->super_minima[first + s] = found.super_minima[s] | 0x8000;
    }
}

static void round_share(void *task, long share) {
    const rounding *t = task;
    long end = (share + 1) * SHARE * TOGETHER;
    for (long first = share * SHARE * TOGETHER; first < end && first < t->count; first += TOGETHER) round_unit(t, first);
}

/* Round finite values [count, 256]. The largest weight of a group is tried on the codes of `ends`. Writes codes
 * [count, 256], float16 super-scales and super-minima [count], sub-scales and sub-minima [count, 8]. */
void round_super_blocks(const float *values, long count, const float *ends, long num_ends, uint8_t *codes,
                        uint16_t *super_scales, uint16_t *super_minima, int8_t *sub_scales, int8_t *sub_minima,
                        int threads) {
    rounding t = {values, ends, count, num_ends, codes, super_scales, super_minima, sub_scales, sub_minima};
    long units = (count + TOGETHER - 1) / TOGETHER;
    parallel_for(round_share, &t, (units + SHARE - 1) / SHARE, threads);
}
