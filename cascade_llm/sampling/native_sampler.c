/* From logits to tokens, one row at a time; see native_sampler.py, which compiles this at start.
 *
 * A row is read once and then worked on in its thread's scratch memory, which a processor's second-level cache holds.
 * Weights are floats from 0 to 1, which are ordered as their bits are; masses are doubles. The two orders are those of
 * draw.py: tokens are kept by descending weight, ties by ascending id, and drawn by ascending id. The tables of lanes
 * are those of lanes.py and lane_tables.py.
 *
 * NaN and infinity are found by their bits, so that nothing depends on how a compiler orders comparisons.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "parallel.h"

enum { BLOCK_LEN = 256 };        /* tokens to each partial sum of a row */
enum { RADIX = 4096 };           /* buckets of the mass histogram; floats to 1.0 have 30 bits: 12, 9 and 9 */
enum { PARALLEL_FROM = 16384 };  /* logits from which a second thread pays for its start */
static const uint32_t INFINITE = 0x7f800000;
static const float SMALLEST_WEIGHT = 0x1p-126f;
static const double LOWEST_TEMPERATURE = 1e-20;

/* What a row keeps: weights above `weight`, and those equal to it whose id is at most `last_tie`. */
typedef struct {
    float weight;
    long last_tie;
} Cut;

typedef struct {
    long top_k;
    double top_p, min_p, uniform;
} Draw;

/* The tables of all lanes, row after row. */
typedef struct {
    const int64_t *draw_keys, *top_k;
    const double *shares;   /* temperature (0: greedy), top_p, min_p */
    const float *penalties; /* presence, frequency, repetition */
    const void *counts;     /* [lanes, size], or null: twice a token's uses in the output, plus 1 if the prompt has it */
    long count_bytes;       /* 2 or 4 */
    const int64_t *bias_ids;
    const float *bias;
    const int64_t *ending_ids, *ends_from; /* lists are padded with `size` */
    long bias_len, endings_len;
} Lanes;

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline long shorter(long x, long y) { return x < y ? x : y; }

/* The next float above one that is not negative. */
static inline float next_above(float value) { return float_of_bits(bits_of(value) + 1); }

/* ---- Logits ---- */

/* A signed integer that orders float bits as the numbers are; its own inverse. */
static inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

/* Widen a bfloat16 row. */
static void widen(const uint16_t *restrict source, float *restrict target, long size) {
    for (long i = 0; i < size; i++) target[i] = float_of_bits((uint32_t)source[i] << 16);
}

/* The maximum of a row; NaN where it holds a NaN. */
static float maximum(const float *row, long size) {
    int32_t largest = INT32_MIN, magnitude = 0;
#pragma omp simd reduction(max : largest, magnitude)
    for (long i = 0; i < size; i++) {
        int32_t bits = (int32_t)bits_of(row[i]), key = ordered(bits), size_bits = bits & 0x7fffffff;
        largest = key > largest ? key : largest;
        magnitude = size_bits > magnitude ? size_bits : magnitude;
    }
    return (uint32_t)magnitude > INFINITE ? NAN : float_of_bits((uint32_t)ordered(largest));
}

/* `maximum` of a bfloat16 row: the same in half the width. */
static float maximum_bfloat16(const uint16_t *row, long size) {
    int16_t largest = INT16_MIN, magnitude = 0;
#pragma omp simd reduction(max : largest, magnitude)
    for (long i = 0; i < size; i++) {
        int16_t bits = (int16_t)row[i], key = (int16_t)(bits ^ ((bits >> 15) & 0x7fff)), size_bits = bits & 0x7fff;
        largest = key > largest ? key : largest;
        magnitude = size_bits > magnitude ? size_bits : magnitude;
    }
    if (magnitude > 0x7f80) return NAN;
    return float_of_bits((uint32_t)(uint16_t)(largest ^ ((largest >> 15) & 0x7fff)) << 16);
}

/* The first place in row [size] that equals `value`, or `size`. */
static long first_equal(const float *row, float value, long size) {
    for (long begin = 0; begin < size; begin += BLOCK_LEN) {
        long end = shorter(begin + BLOCK_LEN, size);
        int found = 0;
        for (long i = begin; i < end; i++) found |= row[i] == value;
        if (!found) continue;
        while (row[begin] != value) begin++;
        return begin;
    }
    return size;
}

static long first_equal_bfloat16(const uint16_t *row, float value, long size) {
    uint16_t wanted = (uint16_t)(bits_of(value) >> 16), other = value == 0.0f ? wanted ^ 0x8000 : wanted;
    for (long begin = 0; begin < size; begin += BLOCK_LEN) {
        long end = shorter(begin + BLOCK_LEN, size);
        uint16_t found = 0;
        for (long i = begin; i < end; i++) found |= (row[i] == wanted) | (row[i] == other);
        if (!found) continue;
        while (row[begin] != wanted && row[begin] != other) begin++;
        return begin;
    }
    return size;
}

/* weights = e^((logits - largest) / temperature), those below 2^-125 zero, and the sum of each block; may be in place.
 * The exponent's factor is a float and what it lacks; the polynomial is Taylor's for 2^r, |r| <= 1/2. */
static void weigh(const float *logits, float *weights, double *sums, long size, float largest, double temperature) {
    double scale = 1.4426950408889634 / (temperature > LOWEST_TEMPERATURE ? temperature : LOWEST_TEMPERATURE);
    float high = (float)scale, low = (float)(scale - high);
    for (long begin = 0; begin < size; begin += BLOCK_LEN) {
        long end = shorter(begin + BLOCK_LEN, size);
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = begin; i < end; i++) {
            float below = logits[i] - largest, exponent = below * high;
            float whole = rintf(exponent > -125.0f ? exponent : -125.0f);
            float r = (below * high - whole) + below * low;
            float p = 1.5252733e-5f;
            p = p * r + 1.5403530e-4f;
            p = p * r + 1.3333558e-3f;
            p = p * r + 9.6181291e-3f;
            p = p * r + 5.5504109e-2f;
            p = p * r + 2.4022651e-1f;
            p = p * r + 6.9314718e-1f;
            p = p * r + 1.0f;
            float weight = p * float_of_bits((uint32_t)((int32_t)whole + 127) << 23);
            weights[i] = exponent >= -125.0f ? weight : 0.0f;
            sum += weights[i];
        }
        sums[begin / BLOCK_LEN] = sum;
    }
}

/* ---- Filters ---- */

/* Collect the values whose bits, shifted, lie in [least, most]; returns how many. May be in place. */
static long collect(const float *values, float *found, long size, int shift, uint32_t least, uint32_t most) {
    long count = 0, i = 0;
#ifdef __AVX512F__
    __m512i from = _mm512_set1_epi32((int)least), range = _mm512_set1_epi32((int)(most - least));
    __m128i by = _mm_cvtsi32_si128(shift);
    for (; i + 16 <= size; i += 16) {
        __m512i bits = _mm512_loadu_si512(values + i);
        __m512i place = _mm512_sub_epi32(_mm512_srl_epi32(bits, by), from);
        __mmask16 inside = _mm512_cmple_epu32_mask(place, range);
        if (!inside) continue;
        _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(inside, bits));
        count += __builtin_popcount(inside);
    }
#endif
    for (; i < size; i++) {
        float value = values[i];
        found[count] = value;
        count += (bits_of(value) >> shift) - least <= most - least;
    }
    return count;
}

/* Sum the values (or count them) by the bits above `shift`; two copies, so that neighbours in one bucket overlap. */
static inline void fill_histogram(double sums[2][RADIX], const float *values, long size, int shift, uint32_t mask,
                                  int counts) {
    memset(sums[0], 0, (mask + 1) * sizeof(double));
    memset(sums[1], 0, (mask + 1) * sizeof(double));
    long i = 0;
    for (; i + 2 <= size; i += 2) {
        sums[0][bits_of(values[i]) >> shift & mask] += counts ? 1.0 : values[i];
        sums[1][bits_of(values[i + 1]) >> shift & mask] += counts ? 1.0 : values[i + 1];
    }
    if (i < size) sums[0][bits_of(values[i]) >> shift & mask] += counts ? 1.0 : values[i];
}

/* The id of the n-th weight equal to `value`, of at least n. */
static long nth_equal(const float *weights, float value, long n, long size) {
    long begin = 0, found = 0;
    for (; begin < size; begin += BLOCK_LEN) {
        long end = shorter(begin + BLOCK_LEN, size), here = 0;
        for (long i = begin; i < end; i++) here += weights[i] == value;
        if (found + here >= n) break;
        found += here;
    }
    while (begin < size && (found += weights[begin] == value) < n) begin++;
    return begin;
}

/* The shortest prefix, by descending weight, of the weights from `floor` on whose sum (or count) reaches `wanted`;
 * all of them where rounding leaves it short. `listed` is scratch for size + 16 floats. */
static inline Cut shortest_prefix(const float *weights, float *listed, long size, float floor, double wanted,
                                  int counts) {
    static const int SHIFTS[] = {18, 9, 0};
    static const uint32_t MASKS[] = {RADIX - 1, 511, 511};
    double sums[2][RADIX], above = 0;
    long num_listed = collect(weights, listed, size, 0, bits_of(floor), INFINITE);
    for (int level = 0; level < 3; level++) {
        fill_histogram(sums, listed, num_listed, SHIFTS[level], MASKS[level], counts);
        long bucket = MASKS[level], passed = -1;
        for (; bucket >= 0; bucket--) {
            double sum = sums[0][bucket] + sums[1][bucket];
            if (sum == 0.0) continue;
            if (above + sum >= wanted) break;
            above += sum;
            passed = bucket;
        }
        if (bucket < 0 && level == 0) return (Cut){floor, size};
        if (bucket < 0) { /* in finer buckets the sum rounds to less than the coarse one did: it is the lowest */
            bucket = passed;
            above -= sums[0][bucket] + sums[1][bucket];
        }
        uint32_t upper = level ? bits_of(listed[0]) >> (SHIFTS[level] + 9) << 9 : 0;
        uint32_t leading = upper | (uint32_t)bucket;
        num_listed = collect(listed, listed, num_listed, SHIFTS[level], leading, leading);
    }
    double each = counts ? 1.0 : listed[0];
    long ties = (long)ceil((wanted - above) / each);
    if (ties > 1 && above + (double)(ties - 1) * each >= wanted) ties--;
    if (ties >= num_listed) return (Cut){listed[0], size};
    return (Cut){listed[0], nth_equal(weights, listed[0], ties < 1 ? 1 : ties, size)};
}

static double sum_from(const float *weights, long begin, long end, float floor) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = begin; i < end; i++) sum += weights[i] >= floor ? weights[i] : 0.0f;
    return sum;
}

/* The kept sum of each block. */
static void sum_blocks(const float *weights, double *sums, long size, Cut cut) {
    for (long begin = 0; begin < size; begin += BLOCK_LEN) {
        long end = shorter(begin + BLOCK_LEN, size), ties_end = shorter(end, cut.last_tie + 1);
        if (ties_end < begin) ties_end = begin;
        sums[begin / BLOCK_LEN] = sum_from(weights, begin, ties_end, cut.weight) +
                                  sum_from(weights, ties_end, end, next_above(cut.weight));
    }
}

static double total(const double *sums, long size) {
    double sum = 0;
    for (long block = 0; block * BLOCK_LEN < size; block++) sum += sums[block];
    return sum;
}

static Cut shorter_cut(Cut x, Cut y) {
    if (x.weight != y.weight) return x.weight > y.weight ? x : y;
    return x.last_tie < y.last_tie ? x : y;
}

/* What top_k, then top_p, then min_p keep; `sums` become those of the kept weights. */
static Cut filter(const float *weights, float *listed, double *sums, long size, const Draw *asked) {
    Cut cut = {0.0f, size};
    if (asked->top_k < size) {
        cut = shortest_prefix(weights, listed, size, SMALLEST_WEIGHT, (double)asked->top_k, 1);
        sum_blocks(weights, sums, size, cut);
    }
    if (asked->top_p < 1.0) {
        /* All weights below this together are less than what top_p leaves out. */
        double mass = total(sums, size), spare = 0.999 * (1.0 - asked->top_p) * mass / (double)size;
        float floor = cut.weight > SMALLEST_WEIGHT ? cut.weight : SMALLEST_WEIGHT;
        if (cut.weight == 0.0f && spare > floor) floor = (float)spare;
        Cut top_p = shortest_prefix(weights, listed, size, floor, asked->top_p * mass, 0);
        cut = shorter_cut(cut, top_p);
    }
    if (asked->min_p > 0.0) {
        double least = asked->min_p * (double)maximum(weights, size);
        float floor = (float)least;
        if ((double)floor < least) floor = next_above(floor);
        cut = shorter_cut(cut, (Cut){floor, size});
    }
    sum_blocks(weights, sums, size, cut);
    return cut;
}

/* The inverse CDF over the kept tokens: first by block, then inside the block. */
static long invert(const float *weights, const double *sums, long size, Cut cut, double uniform) {
    double target = uniform * total(sums, size), reached = 0;
    long block = 0, chosen = -1, num_blocks = (size + BLOCK_LEN - 1) / BLOCK_LEN;
    while (block < num_blocks && reached + sums[block] <= target) reached += sums[block++];
    if (block == num_blocks) /* rounding left the sum short: the last token that is kept */
        while (block > 0 && sums[--block] == 0.0) continue;
    for (long i = block * BLOCK_LEN; i < shorter((block + 1) * BLOCK_LEN, size); i++) {
        if (weights[i] == 0.0f || weights[i] < cut.weight || (weights[i] == cut.weight && i > cut.last_tie)) continue;
        chosen = i;
        reached += weights[i];
        if (reached > target) break;
    }
    return chosen < 0 ? 0 : chosen;
}

static long draw_one(const float *weights, float *listed, double *sums, long size, const Draw *asked) {
    Cut cut = {0.0f, size};
    if (asked->top_k < size || asked->top_p < 1.0 || asked->min_p > 0.0)
        cut = filter(weights, listed, sums, size, asked);
    return invert(weights, sums, size, cut, asked->uniform);
}

/* ---- Adjustments ---- */

static inline int32_t count_of(const Lanes *lanes, long place) {
    return lanes->count_bytes == 2 ? ((const int16_t *)lanes->counts)[place] : ((const int32_t *)lanes->counts)[place];
}

/* List the tokens that a lane has used, few of a vocabulary; returns how many. */
static long list_used(const Lanes *lanes, long lane, int32_t *tokens, long size) {
    long found = 0, i = 0;
#ifdef __AVX512F__
    const int16_t *halves = (const int16_t *)lanes->counts + lane * size;
    const int32_t *counts = (const int32_t *)lanes->counts + lane * size;
    __m512i ids = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= size; i += 16) {
        __m512i here = lanes->count_bytes == 2
                           ? _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(halves + i)))
                           : _mm512_loadu_si512(counts + i);
        __mmask16 used = _mm512_test_epi32_mask(here, here);
        _mm512_storeu_si512(tokens + found, _mm512_maskz_compress_epi32(used, ids));
        found += __builtin_popcount(used);
        ids = _mm512_add_epi32(ids, _mm512_set1_epi32(16));
    }
#endif
    for (; i < size; i++) {
        tokens[found] = (int32_t)i;
        found += count_of(lanes, lane * size + i) != 0;
    }
    return found;
}

/* `tokens` is scratch for size + 16 integers. */
static void penalize(float *row, const Lanes *lanes, long lane, int32_t *tokens, long size) {
    const float *penalties = lanes->penalties + 3 * lane;
    long num_used = list_used(lanes, lane, tokens, size);
    for (long i = 0; i < num_used; i++) {
        float logit = row[tokens[i]];
        int32_t uses = count_of(lanes, lane * size + tokens[i]) >> 1;
        logit = logit > 0.0f ? logit / penalties[2] : logit * penalties[2];
        row[tokens[i]] = logit - (uses > 0 ? penalties[0] : 0.0f) - (float)uses * penalties[1];
    }
}

static int has_penalty(const Lanes *lanes, long lane) {
    const float *penalties = lanes->penalties + 3 * lane;
    return lanes->counts && (penalties[0] != 0.0f || penalties[1] != 0.0f || penalties[2] != 1.0f);
}

static int has_bias(const Lanes *lanes, long lane, long size) {
    return lanes->bias_len && lanes->bias_ids[lane * lanes->bias_len] < size;
}

/* Repetition, presence and frequency penalty, bias, hidden endings, mask. */
static void adjust(float *row, const Lanes *lanes, long lane, long position, const int32_t *mask, int32_t *scratch,
                   long size) {
    if (has_penalty(lanes, lane)) penalize(row, lanes, lane, scratch, size);
    const int64_t *ids = lanes->bias_ids + lane * lanes->bias_len, *endings = lanes->ending_ids + lane * lanes->endings_len;
    for (long i = 0; i < lanes->bias_len && ids[i] < size; i++) row[ids[i]] += lanes->bias[lane * lanes->bias_len + i];
    if (position < lanes->ends_from[lane])
        for (long i = 0; i < lanes->endings_len && endings[i] < size; i++) row[endings[i]] = -INFINITY;
    for (long i = 0; mask && i < size; i++)
        if (!((uint32_t)mask[i / 32] >> (i % 32) & 1)) row[i] = -INFINITY;
}

/* ---- Rows ---- */

/* SplitMix64's output number `position` of the stream `key`, in [0, 1). */
static double uniform_number(uint64_t key, uint64_t position) {
    uint64_t value = key + (position + 1) * 0x9E3779B97F4A7C15u;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return (double)((value ^ (value >> 31)) >> 11) * 0x1p-53;
}

/* Floats of scratch memory that each thread needs. */
long scratch_len(long size) { return 2 * ((size + BLOCK_LEN - 1) / BLOCK_LEN) + 2 * size + 32; }

/* The scratch memory of one thread. */
typedef struct {
    double *sums;
    float *weights, *listed;
} Scratch;

static Scratch scratch_of(float *scratch, long part, long size) {
    double *sums = (double *)(scratch + part * scratch_len(size));
    float *weights = (float *)(sums + (size + BLOCK_LEN - 1) / BLOCK_LEN);
    return (Scratch){sums, weights, weights + size};
}

/* The arguments of `sample_rows`, and the first row that no thread has taken. */
typedef struct {
    const void *logits;
    int bfloat16;
    long stride, size;
    const Lanes *lanes;
    const int64_t *columns;
    const int32_t *masks;
    const int64_t *mask_rows;
    long num_samples;
    int64_t *token_ids;
    uint8_t *finite;
    float *scratch;
    long next;
} Samples;

static void sample_row(const Samples *s, Scratch own, long n) {
    float *weights = own.weights;
    const Lanes *lanes = s->lanes;
    long size = s->size, lane = s->columns[s->num_samples + n], position = s->columns[2 * s->num_samples + n];
    const uint16_t *halves = (const uint16_t *)s->logits + s->columns[n] * s->stride;
    const float *row = (const float *)s->logits + s->columns[n] * s->stride;
    const int32_t *mask = s->masks && s->mask_rows[n] >= 0 ? s->masks + s->mask_rows[n] * ((size + 31) / 32) : NULL;
    const double *shares = lanes->shares + 3 * lane;
    int is_half = s->bfloat16;
    if (mask || has_penalty(lanes, lane) || has_bias(lanes, lane, size) || position < lanes->ends_from[lane]) {
        if (is_half) widen(halves, weights, size);
        else memcpy(weights, row, size * sizeof *row);
        adjust(weights, lanes, lane, position, mask, (int32_t *)own.listed, size);
        row = weights;
        is_half = 0;
    }
    float largest = is_half ? maximum_bfloat16(halves, size) : maximum(row, size);
    s->finite[n] = isfinite(largest) != 0;
    s->token_ids[n] = 0;
    if (!s->finite[n]) return;
    if (shares[0] == 0.0) {
        s->token_ids[n] = is_half ? first_equal_bfloat16(halves, largest, size) : first_equal(row, largest, size);
        return;
    }
    if (is_half) widen(halves, weights, size);
    weigh(is_half ? weights : row, weights, own.sums, size, largest, shares[0]);
    Draw asked = {lanes->top_k[lane], shares[1], shares[2],
                  uniform_number((uint64_t)lanes->draw_keys[lane], (uint64_t)position)};
    s->token_ids[n] = draw_one(weights, own.listed, own.sums, size, &asked);
}

/* A part is a thread's scratch: it takes rows until none is left. */
static void sample_part(void *of, long part) {
    Samples *s = of;
    const Scratch own = scratch_of(s->scratch, part, s->size);
    for (long n; (n = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED)) < s->num_samples;) sample_row(s, own, n);
}

static long parts_for(long rows, long size, int threads) { return rows * size >= PARALLEL_FROM ? shorter(rows, threads) : 1; }

/* One token per sample; logits are [any, stride], float or bfloat16, of which `size` columns count.
 * columns: [3, num_samples], the row, the lane and the position of each.
 * masks: [any, words of 32 bits], or null; mask_rows: [num_samples], -1 for none.
 * Not finite: `finite` is 0, and the token 0. */
void sample_rows(const void *logits, int bfloat16, long stride, long size, const Lanes *lanes, const int64_t *columns,
                 const int32_t *masks, const int64_t *mask_rows, long num_samples, int64_t *token_ids, uint8_t *finite,
                 float *scratch, int threads) {
    Samples s = {logits, bfloat16, stride, size, lanes, columns, masks, mask_rows, num_samples, token_ids, finite,
                 scratch, 0};
    parallel_for(sample_part, &s, parts_for(num_samples, size, threads), threads);
}

/* The arguments of `draw_rows`, and the first row that no thread has taken. */
typedef struct {
    const float *weights;
    long size;
    const Draw *asked;
    long num_rows;
    int64_t *token_ids;
    float *scratch;
    long next;
} Draws;

static void draw_part(void *of, long part) {
    Draws *d = of;
    const Scratch own = scratch_of(d->scratch, part, d->size);
    for (long n; (n = __atomic_fetch_add(&d->next, 1, __ATOMIC_RELAXED)) < d->num_rows;) {
        const float *weights = d->weights + n * d->size;
        sum_blocks(weights, own.sums, d->size, (Cut){0.0f, d->size});
        d->token_ids[n] = draw_one(weights, own.listed, own.sums, d->size, &d->asked[n]);
    }
}

/* The same draws from weights [num_rows, size], of which each row has one above 0. */
void draw_rows(const float *weights, long size, const Draw *asked, long num_rows, int64_t *token_ids, float *scratch,
               int threads) {
    Draws d = {weights, size, asked, num_rows, token_ids, scratch, 0};
    parallel_for(draw_part, &d, parts_for(num_rows, size, threads), threads);
}
