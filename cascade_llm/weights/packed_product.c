/* y = x Wᵀ + b with W kept in few bits; see packed.py, which builds the matrices and calls this.
 *
 * A matrix is a list of pieces, the parts that its checkpoint stored; each has codes of its own kind. A piece lies in
 * tiles of 16 outputs, so that a vector's lanes are outputs and no sum runs across lanes. A tile is a run of blocks of
 * 32 inputs, and one thread reads it from front to back:
 *
 *   super    [16 scales][16 minima]                of float16 or float32, for the blocks that share them
 *   block    [16 or 32 sub-scales][as many sub-minima]   where the scales are themselves integers
 *            planes of code bits
 *
 * In the planes four neighbouring inputs of an output are four neighbouring bytes, which is what the integer dot
 * products of processors take (VPDPBUSD, VPMADDUBSW, SDOT). A block has eight such steps:
 *
 *   4 bits   4 vectors of 64 bytes, step s in the low half of vector s, step s + 4 in the high half
 *   2 bits   2 vectors, step s in vector s % 2 at bit 2 (s / 2)
 *   1 bit    1 vector, step s at bit s
 *   8 bits   8 vectors
 *
 * and 3, 5 and 6 bits are two planes. Codes that are floats lie as 16 numbers for each input, bfloat16 as 16 pairs for each two.
 *
 * Products come in two ways. With quantized activations each row's 32 inputs become integers of -127 to 127 and a
 * scale, as llama.cpp does, and sums within a block are exact. The exact way widens codes to float in registers. A
 * row's arithmetic is the same whatever rows are beside it.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum { TILE = 16, BLOCK = 32, STEPS = 8, STEP = 4 };

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

enum {
    ROWS = 6,                /* at most, that a tile meets at once */
    PER_TILE = TILE / LANES, /* vectors */
    PAIR = 2 * PER_TILE      /* vectors of two tiles, which the rows of one x meet together where registers are many */
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

typedef uint8_t bytes __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef uint16_t pairs __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t small __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t smallest __attribute__((vector_size(LANES), aligned(1), may_alias));

/* Kinds of codes; the numbers are those of packed.py. */
enum code { U2, U3, U4, U5, U6, U8, TABLE, BFLOAT16, FLOAT16, E4M3, E5M2, FLOAT32, CODES };
enum scale { UNSCALED, SCALE16, SCALE32, SUB };

typedef struct {
    const uint8_t *data;
    long tile_bytes, num_outputs, first_output, super_blocks;
    int32_t code, scale, zero, has_minimum;
    uint8_t values[16]; /* of TABLE, with 128 added */
} piece;

/* Rows of activations lie in groups of as many as a tile takes at once, and within a group block by block, so that one
 * pointer walks them beside the weights. A block of a group of n rows: */
enum {
    INTEGER_BYTES = 64, /* codes int8 [n][32]; scales float [n]; sums of codes int32 [n]; totals (scale * sum) float [n];
                           sums of the two halves int32 [2][n]; their totals float [2][n] */
    FLOAT_BYTES = 144   /* values float [n][32]; totals float [n]; totals of the two halves float [2][n] */
};

typedef struct {
    const piece *pieces;
    long num_pieces, rows, in_size, y_stride;
    const uint8_t *integers, *floats; /* the groups; a row's share of a block has the bytes above */
    const void *x;
    const int64_t *sources; /* the row of x that each row takes; null: its own */
    const void *bias;
    void *y;
    int is_bfloat16; /* of bias and y, and of x */
} product;

INLINE floats broadcast(float x) { return x - (floats){}; }
INLINE ints broadcast_int(int32_t x) { return x - (ints){}; }

/* ---- what differs between processors ---- */

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__)

enum { SIGNED_CODES = 0, RESTARTS = 0 };
typedef ints partial;
INLINE partial dot(partial sum, bytes w, int32_t x, int is_signed) {
    (void)is_signed;
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }
INLINE bytes lookup(const uint8_t *values, bytes codes) {
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values));
    return (bytes)_mm512_shuffle_epi8(table, (__m512i)codes);
}
INLINE floats load_float16(const uint8_t *x) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }
INLINE floats float16_of(halves x) { return (floats)_mm512_cvtph_ps((__m256i)x); }

#elif defined(__AVX2__)

INLINE bytes lookup(const uint8_t *values, bytes codes) {
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    return (bytes)_mm256_shuffle_epi8(table, (__m256i)codes);
}
INLINE floats load_float16(const uint8_t *x) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)); }
INLINE floats float16_of(halves x) { return (floats)_mm256_cvtph_ps((__m128i)x); }

#if defined(__AVXVNNI__)
enum { SIGNED_CODES = 0, RESTARTS = 0 };
typedef ints partial;
INLINE partial dot(partial sum, bytes w, int32_t x, int is_signed) {
    (void)is_signed;
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
}
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }
#else
/* Products are summed in 16 bits as long as they fit, then in 32. Codes of 8 bits fill 16 bits at once, and are taken
 * as signed: |w| times x with w's sign. */
enum { SIGNED_CODES = 1, RESTARTS = 1 };
typedef int16_t partial __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
INLINE partial dot(partial sum, bytes w, int32_t x, int is_signed) {
    __m256i row = _mm256_set1_epi32(x), weight = (__m256i)w;
    if (is_signed) /* the sum is 0 */
        return (partial)_mm256_maddubs_epi16(_mm256_abs_epi8(weight), _mm256_sign_epi8(row, weight));
    sum += (partial)_mm256_maddubs_epi16(weight, row);
    __asm__("" : "+x"(sum)); /* GCC would keep all products, to add them in another order */
    return sum;
}
INLINE ints flush(ints sum, partial part) {
    sum += (ints)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1));
    __asm__("" : "+x"(sum)); /* as above */
    return sum;
}
#endif

#else

typedef ints partial;
#if defined(__ARM_FEATURE_DOTPROD)
enum { SIGNED_CODES = 1, RESTARTS = 0 };
INLINE partial dot(partial sum, bytes w, int32_t x, int is_signed) {
    (void)is_signed; /* unsigned codes are below 64 */
    return (ints)vdotq_s32((int32x4_t)sum, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
}
#else
enum { SIGNED_CODES = 0, RESTARTS = 0 };
INLINE partial dot(partial sum, bytes w, int32_t x, int is_signed) {
    (void)is_signed;
    words lanes = (words)w;
    for (int j = 0; j < STEP; j++) sum += (ints)(lanes >> 8 * j & 255) * (int8_t)(x >> 8 * j);
    return sum;
}
#endif
INLINE ints flush(ints sum, partial part) { (void)sum; return part; }
INLINE bytes lookup(const uint8_t *values, bytes codes) {
    bytes found;
    for (int i = 0; i < 4 * LANES; i++) found[i] = values[codes[i]];
    return found;
}
INLINE floats float16_of(halves x) {
    /* The exponent moves up by 112 in a multiplication, which makes subnormals right; infinity and NaN are set. */
    words bits = __builtin_convertvector(x, words), magnitude = bits & 0x7fff;
    floats value = (floats)(magnitude << 13) * 0x1p112f;
    words special = (words)(magnitude >= 0x7c00);
    return (floats)((words)value | (special & 0x7f800000) | (bits & 0x8000) << 16);
}
INLINE floats load_float16(const uint8_t *x) {
    halves stored;
    memcpy(&stored, x, sizeof stored);
    return float16_of(stored);
}
#endif

/* ---- across the lanes of one vector ---- */

#if defined(__AVX512F__)
INLINE int32_t sum_of(ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
INLINE uint32_t largest_of(words x) { return _mm512_reduce_max_epu32((__m512i)x); }
#elif defined(__AVX2__)
INLINE int32_t sum_of(ints x) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}
INLINE uint32_t largest_of(words x) {
    __m128i most = _mm_max_epu32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    most = _mm_max_epu32(most, _mm_shuffle_epi32(most, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(most, _mm_shuffle_epi32(most, 0xb1)));
}
#else
INLINE int32_t sum_of(ints x) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}
INLINE uint32_t largest_of(words x) {
    uint32_t most = 0;
    for (int i = 0; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
}
#endif

/* ---- codes ---- */

INLINE bytes load_bytes(const uint8_t *x) { return *(const bytes *)x; }

/* Bytes that a block's planes take. */
INLINE long plane_bytes(int code) {
    switch (code) {
    case U2: return 128;
    case U3: return 192;
    case U4: case TABLE: return 256;
    case U5: return 320;
    case U6: return 384;
    case BFLOAT16: case FLOAT16: return 2 * TILE * BLOCK;
    case FLOAT32: return 4 * TILE * BLOCK;
    default: return 512;
    }
}

INLINE int is_halved(int code) { return code == U2 || code == U3 || code == U6; }
INLINE int is_eight(int code) { return code == U8 || code == TABLE; }

/* Bits of every byte, moved from bit `from` to bit `to`; what is outside `mask` is cleared. */
INLINE bytes moved(bytes x, int from, int to, int mask) {
    pairs wide = (pairs)x;
    if (to > from) wide <<= to - from;
    if (from > to) wide >>= from - to;
    return (bytes)wide & (uint8_t)mask;
}

/* The unsigned codes of one step and one vector of outputs; `plane` points to the vector in the block's first plane. */
INLINE bytes step_codes(int code, const uint8_t *plane, int s, const uint8_t *values) {
    bytes low;
    switch (code) {
    case U8: return load_bytes(plane + 64 * s);
    case U2: case U3:
        low = moved(load_bytes(plane + 64 * (s % 2)), 2 * (s / 2), 0, 3);
        if (code == U3) low |= moved(load_bytes(plane + 128), s, 2, 4);
        return low;
    default:
        low = moved(load_bytes(plane + 64 * (s % 4)), s < 4 ? 0 : 4, 0, 15);
        if (code == U5) low |= moved(load_bytes(plane + 256), s, 4, 16);
        if (code == U6) low |= moved(load_bytes(plane + 256 + 64 * (s % 2)), 2 * (s / 2), 4, 48);
        return code == TABLE ? lookup(values, low) : low;
    }
}

/* Steps whose products fit 16 bits together, at codes of that size times 127 twice. */
INLINE int steps_in_16_bits(int code) {
    switch (code) {
    case U6: return 2;
    case U5: return 4;
    case U8: case TABLE: return 1;
    default: return 8;
    }
}

INLINE floats load_number(int scale, const uint8_t *x) {
    if (scale == SCALE32) return *(const floats *)x;
    return load_float16(x);
}

INLINE floats load_sub(const uint8_t *x) {
    /* in steps that the processors have; GCC takes the direct way apart */
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(*(const small *)x, shorts), ints), floats);
}

INLINE int inputs_side_by_side(int code) { return code == BFLOAT16 ? 2 : 1; }

/* LANES float codes of input `i + j` of a block, whose codes begin at `x`; `i` is the first of those side by side. Two inputs' bfloat16 lie side by side for each
 * output, so that a shift and a mask widen them. e4m3 and e5m2 are float16 with fewer digits; e4m3 comes 2**-8 as large,
 * and without NaN. */
INLINE floats load_float_codes(int code, const uint8_t *x, int i, int j) {
    if (code == FLOAT32) return *(const floats *)(x + 4 * TILE * i);
    if (code == FLOAT16) return load_float16(x + 2 * TILE * i);
    if (code == BFLOAT16) {
        words both = *(const words *)(x + 2 * TILE * i);
        if (j) both &= 0xffff0000;
        else both <<= 16;
        return (floats)both;
    }
    if (code == E5M2) return float16_of(__builtin_convertvector(*(const smallest *)(x + TILE * i), halves) << 8);
    shorts wide = __builtin_convertvector(*(const small *)(x + TILE * i), shorts);
    return float16_of((halves)(wide << 7) & 0xbfff);
}

/* The same of a row of bfloat16 or float32 in memory. */
INLINE floats load_values(int is_bfloat16, const uint8_t *x) {
    if (is_bfloat16) return (floats)(__builtin_convertvector(*(const halves *)x, words) << 16);
    return *(const floats *)x;
}

/* What the scales of float codes are multiplied by. */
INLINE float code_factor(int code) { return code == E4M3 ? 256.0f : 1.0f; }

/* Where the numbers of a tile lie, as it is walked block by block. */
typedef struct {
    const uint8_t *next, *scales, *minima, *sub_scales, *sub_minima, *planes;
    long left; /* blocks that these scales still serve */
} cursor;

INLINE void advance(const piece *p, int code, cursor *c) {
    int head = p->scale == SCALE32 ? 4 * TILE : 2 * TILE, subs = is_halved(code) ? 2 * TILE : TILE;
    if (p->scale != UNSCALED && c->left-- == 0) {
        c->left = p->super_blocks - 1;
        c->scales = c->next;
        c->next += head;
        if (p->has_minimum) {
            c->minima = c->next;
            c->next += head;
        }
    }
    if (p->scale == SUB) {
        c->sub_scales = c->next;
        c->next += subs;
        if (p->has_minimum) {
            c->sub_minima = c->next;
            c->next += subs;
        }
    }
    c->planes = c->next;
    c->next += plane_bytes(code);
}

/* Where the second tile of a pair lies, from the first. */
INLINE long of_pair(const piece *p, int v) { return v / PER_TILE * p->tile_bytes; }

/* Scales of vector `v` of a pair of tiles, for a half of the block where halves have their own. */
INLINE floats scale_of(const piece *p, const cursor *c, int v, int half) {
    int width = p->scale == SCALE32 ? 4 : 2, lane = LANES * (v % PER_TILE);
    floats scale = load_number(p->scale, c->scales + of_pair(p, v) + width * lane);
    if (p->scale == SUB) scale *= load_sub(c->sub_scales + of_pair(p, v) + TILE * half + lane);
    return scale;
}

INLINE floats minimum_of(const piece *p, const cursor *c, int v, int half) {
    int width = p->scale == SCALE32 ? 4 : 2, lane = LANES * (v % PER_TILE);
    floats minimum = load_number(p->scale, c->minima + of_pair(p, v) + width * lane);
    if (p->scale == SUB) minimum *= load_sub(c->sub_minima + of_pair(p, v) + TILE * half + lane);
    return minimum;
}

/* Where the float codes of a vector begin in a block; of bfloat16 two inputs lie side by side. */
INLINE const uint8_t *float_codes_of(const piece *p, int code, const cursor *c, int v) {
    long bytes = plane_bytes(code) / BLOCK * inputs_side_by_side(code);
    return c->planes + of_pair(p, v) + bytes / TILE * LANES * (v % PER_TILE);
}

INLINE const uint8_t *vector_planes(const piece *p, const cursor *c, int v) {
    return c->planes + of_pair(p, v) + 4 * LANES * (v % PER_TILE);
}

/* ---- the products: `vectors` of a pair of tiles from `v0` on, for rows `r0` to `r0 + rows`; all constants but r0 ---- */

/* A block, or where halves have scales of their own the half of it: its sums of products times scales. */
INLINE void integer_sums(const piece *p, int code, const cursor *c, const uint8_t *x, int half, int rows, int v0,
                         int vectors, floats sums[ROWS][PAIR]) {
    int is_signed = SIGNED_CODES && is_eight(code), halved = is_halved(code);
    int zero = p->zero - (is_signed ? 128 : 0), first = 4 * half, last = halved ? first + 4 : STEPS;
    const float *numbers = (const float *)(x + rows * BLOCK), *x_scales = numbers;
    const int32_t *x_sums = (const int32_t *)numbers + rows * (halved ? 3 + half : 1);
    const float *totals = numbers + rows * (halved ? 5 + half : 2);
    ints whole[ROWS][PAIR];
    partial part[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) {
        ints start = {};
        if (zero) start = broadcast_int(x_sums[r]) * -zero;
        UNROLLED for (int v = 0; v < vectors; v++) {
            whole[r][v] = start;
            if (RESTARTS) part[r][v] = (partial){};
            else part[r][v] = (partial)start;
        }
    }
    UNROLLED for (int s = first; s < last; s++) {
        bytes w[PAIR];
        UNROLLED for (int v = 0; v < vectors; v++) {
            w[v] = step_codes(code, vector_planes(p, c, v0 + v), s, p->values);
            if (is_signed) w[v] ^= 0x80;
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * BLOCK + s * STEP, sizeof four);
            UNROLLED for (int v = 0; v < vectors; v++) part[r][v] = dot(part[r][v], w[v], four, is_signed);
        }
        if (RESTARTS && ((s - first + 1) % steps_in_16_bits(code) == 0 || s + 1 == last))
            UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) {
                whole[r][v] = flush(whole[r][v], part[r][v]);
                part[r][v] = (partial){};
            }
    }
    UNROLLED for (int v = 0; v < vectors; v++) {
        floats scale = scale_of(p, c, v0 + v, half);
        UNROLLED for (int r = 0; r < rows; r++) {
            ints sum = RESTARTS ? whole[r][v] : flush(whole[r][v], part[r][v]);
            sums[r][v] += __builtin_convertvector(sum, floats) * (scale * broadcast(x_scales[r]));
        }
        if (p->has_minimum) {
            floats minimum = minimum_of(p, c, v0 + v, half);
            UNROLLED for (int r = 0; r < rows; r++) sums[r][v] += minimum * broadcast(totals[r]);
        }
    }
}

/* Ask for the same bytes of the next pair of tiles, of those tiles that vectors from `v0` on lie in: a tile is too short
 * for the processor to see that memory is read in order. */
INLINE void ask_for(const piece *p, const uint8_t *block, const uint8_t *end, int v0, int vectors) {
    if (v0 % PER_TILE) return; /* asked by the tile's first vectors */
    for (; block < end; block += 64)
        UNROLLED for (int tile = v0 / PER_TILE; tile <= (v0 + vectors - 1) / PER_TILE; tile++)
            __builtin_prefetch(block + (2 + tile) * p->tile_bytes);
}

INLINE void integer_tile(const product *t, const piece *p, int code, const uint8_t *tile, long r0, int rows, int v0,
                         int vectors, int asks, floats out[ROWS][PAIR]) {
    long blocks = t->in_size / BLOCK;
    const uint8_t *x = t->integers + r0 * blocks * INTEGER_BYTES;
    floats sums[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) sums[r][v] = (floats){};
    cursor c = {tile};
    for (long b = 0; b < blocks; b++, x += rows * INTEGER_BYTES) {
        const uint8_t *block = c.next;
        advance(p, code, &c);
        if (asks) ask_for(p, block, c.next, v0, vectors);
        integer_sums(p, code, &c, x, 0, rows, v0, vectors, sums);
        if (is_halved(code)) integer_sums(p, code, &c, x, 1, rows, v0, vectors, sums);
    }
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) out[r][v0 + v] = sums[r][v];
}

/* As `integer_sums`, with inputs as they are. */
INLINE void exact_sums(const piece *p, int code, const cursor *c, const float *x, int half, int rows, int v0, int vectors,
                       floats sums[ROWS][PAIR]) {
    int halved = is_halved(code), first = 4 * half, last = halved ? first + 4 : STEPS;
    const float *totals = x + rows * (BLOCK + (halved ? 1 + half : 0));
    floats part[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) part[r][v] = (floats){};
    UNROLLED for (int s = first; s < last; s++) {
        bytes w[PAIR];
        UNROLLED for (int v = 0; v < vectors; v++) w[v] = step_codes(code, vector_planes(p, c, v0 + v), s, p->values);
        UNROLLED for (int j = 0; j < STEP; j++) {
            floats wide[PAIR];
            UNROLLED for (int v = 0; v < vectors; v++)
                wide[v] = __builtin_convertvector((ints)((words)w[v] >> 8 * j & 255) - p->zero, floats);
            UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++)
                part[r][v] += wide[v] * broadcast(x[r * BLOCK + s * STEP + j]);
        }
    }
    UNROLLED for (int v = 0; v < vectors; v++) {
        floats scale = scale_of(p, c, v0 + v, half);
        UNROLLED for (int r = 0; r < rows; r++) sums[r][v] += scale * part[r][v];
        if (p->has_minimum) {
            floats minimum = minimum_of(p, c, v0 + v, half);
            UNROLLED for (int r = 0; r < rows; r++) sums[r][v] += minimum * broadcast(totals[r]);
        }
    }
}

INLINE void exact_tile(const product *t, const piece *p, int code, const uint8_t *tile, long r0, int rows, int v0,
                       int vectors, int asks, floats out[ROWS][PAIR]) {
    long blocks = t->in_size / BLOCK;
    const uint8_t *x = t->floats + r0 * blocks * FLOAT_BYTES;
    floats sums[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) sums[r][v] = (floats){};
    cursor c = {tile};
    for (long b = 0; b < blocks; b++, x += rows * FLOAT_BYTES) {
        const uint8_t *block = c.next;
        advance(p, code, &c);
        if (asks) ask_for(p, block, c.next, v0, vectors);
        exact_sums(p, code, &c, (const float *)x, 0, rows, v0, vectors, sums);
        if (is_halved(code)) exact_sums(p, code, &c, (const float *)x, 1, rows, v0, vectors, sums);
    }
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) out[r][v0 + v] = sums[r][v];
}

INLINE void float_tile(const product *t, const piece *p, int code, const uint8_t *tile, long r0, int rows, int v0,
                       int vectors, int asks, floats out[ROWS][PAIR]) {
    long blocks = t->in_size / BLOCK;
    const uint8_t *x = t->floats + r0 * blocks * FLOAT_BYTES;
    int scaled = code == E4M3 || code == E5M2, side_by_side = inputs_side_by_side(code);
    floats sums[ROWS][PAIR], part[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++)
        sums[r][v] = part[r][v] = (floats){};
    cursor c = {tile};
    for (long b = 0; b < blocks; b++, x += rows * FLOAT_BYTES) {
        const float *values = (const float *)x;
        const uint8_t *block = c.next;
        advance(p, code, &c);
        if (asks) ask_for(p, block, c.next, v0, vectors);
        /* unrolled further, GCC would move the sums between registers and memory */
        _Pragma("GCC unroll 1") for (int i = 0; i < BLOCK; i += side_by_side) UNROLLED for (int j = 0; j < side_by_side; j++) {
            floats w[PAIR];
            UNROLLED for (int v = 0; v < vectors; v++)
                w[v] = load_float_codes(code, float_codes_of(p, code, &c, v0 + v), i, j);
            UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++)
                part[r][v] += w[v] * broadcast(values[r * BLOCK + i + j]);
        }
        if (scaled)
            UNROLLED for (int v = 0; v < vectors; v++) {
                floats scale = scale_of(p, &c, v0 + v, 0) * code_factor(code);
                UNROLLED for (int r = 0; r < rows; r++) {
                    sums[r][v] += scale * part[r][v];
                    part[r][v] = (floats){};
                }
            }
    }
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++)
        out[r][v0 + v] = scaled ? sums[r][v] : part[r][v];
}

/* ---- one tile for a block of rows ---- */

INLINE float from_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To the nearest, ties to even; a NaN stays one. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

INLINE void store_outputs(const product *t, const piece *p, long tile, long r0, int rows, const floats out[ROWS][PAIR]) {
    long first = p->first_output + tile * TILE, count = p->num_outputs - tile * TILE;
    if (count > 2 * TILE) count = 2 * TILE;
    float bias[2 * TILE] = {0};
    if (t->bias)
        for (long o = 0; o < count; o++)
            bias[o] = t->is_bfloat16 ? from_bfloat16(((const uint16_t *)t->bias)[first + o])
                                     : ((const float *)t->bias)[first + o];
    for (int r = 0; r < rows; r++) {
        float values[2 * TILE];
        memcpy(values, out[r], sizeof values);
        if (t->bias)
            for (int o = 0; o < 2 * TILE; o++) values[o] += bias[o];
        if (t->is_bfloat16) {
            uint16_t rounded[2 * TILE], *y = (uint16_t *)t->y + (r0 + r) * t->y_stride + first;
            for (int o = 0; o < 2 * TILE; o++) rounded[o] = to_bfloat16(values[o]);
            if (count == 2 * TILE) memcpy(y, rounded, sizeof rounded);
            else memcpy(y, rounded, count * sizeof *y);
        } else {
            float *y = (float *)t->y + (r0 + r) * t->y_stride + first;
            if (count == 2 * TILE) memcpy(y, values, sizeof values);
            else memcpy(y, values, count * sizeof *y);
        }
    }
}

INLINE void tile_of_rows(const product *t, const piece *p, int code, long tile, long r0, int rows, int asks) {
    floats out[ROWS][PAIR];
    const uint8_t *data = p->data + tile * p->tile_bytes;
    /* at a time: what the registers hold beside the sums of these rows */
    int vectors = LANES == 16 || rows <= 2 || code >= BFLOAT16 ? 2 : 1;
    for (int v0 = 0; v0 < PAIR; v0 += vectors) {
        if (code >= BFLOAT16) float_tile(t, p, code, data, r0, rows, v0, vectors, asks, out);
        else if (t->integers) integer_tile(t, p, code, data, r0, rows, v0, vectors, asks, out);
        else exact_tile(t, p, code, data, r0, rows, v0, vectors, asks, out);
    }
    store_outputs(t, p, tile, r0, rows, out);
}

static long num_groups(long rows) { return (rows + ROWS - 1) / ROWS; }

/* Rows come in groups as even as they can be. */
INLINE long first_row(const product *t, long group) {
    long groups = num_groups(t->rows);
    return group >= groups ? t->rows : t->rows * group / groups;
}

/* Groups of rows, for a pair of tiles. */
INLINE void tile_of_code(const product *t, const piece *p, int code, long tile, long first_group, long last_group) {
    long groups = num_groups(t->rows);
    for (long group = first_group; group < last_group && group < groups; group++) {
        long first = first_row(t, group);
        int asks = group == first_group; /* for the next pair of tiles */
        switch (first_row(t, group + 1) - first) {
        case 1: tile_of_rows(t, p, code, tile, first, 1, asks); break;
        case 2: tile_of_rows(t, p, code, tile, first, 2, asks); break;
        case 3: tile_of_rows(t, p, code, tile, first, 3, asks); break;
        case 4: tile_of_rows(t, p, code, tile, first, 4, asks); break;
        case 5: tile_of_rows(t, p, code, tile, first, 5, asks); break;
        case 6: tile_of_rows(t, p, code, tile, first, 6, asks); break;
        }
    }
}

#define PRODUCT_OF(CODE)                                                                                           \
    static __attribute__((noinline)) void product_of_##CODE(const product *t, const piece *p, long tile, long first, \
                                                            long last) {                                           \
        tile_of_code(t, p, CODE, tile, first, last);                                                               \
    }
PRODUCT_OF(U2)
PRODUCT_OF(U3)
PRODUCT_OF(U4)
PRODUCT_OF(U5)
PRODUCT_OF(U6)
PRODUCT_OF(U8)
PRODUCT_OF(TABLE)
PRODUCT_OF(BFLOAT16)
PRODUCT_OF(FLOAT16)
PRODUCT_OF(E4M3)
PRODUCT_OF(E5M2)
PRODUCT_OF(FLOAT32)

typedef void (*tile_product)(const product *, const piece *, long, long, long);
static const tile_product PRODUCTS[CODES] = {product_of_U2,    product_of_U3,       product_of_U4,      product_of_U5,
                                             product_of_U6,    product_of_U8,       product_of_TABLE,   product_of_BFLOAT16,
                                             product_of_FLOAT16, product_of_E4M3,   product_of_E5M2,    product_of_FLOAT32};

/* ---- activations ---- */

enum { PER_BLOCK = BLOCK / LANES };

/* 32 integers of -127 to 127 and their scale; a block with NaN or infinity gets the scale NaN. `sums` are the two
 * halves'. Adding 1.5 * 2**23 rounds to the nearest integer, which then are the lowest bits. */
INLINE float quantize_block(const floats *x, int8_t *codes, int32_t *sums) {
    words largest = {};
    UNROLLED for (int v = 0; v < PER_BLOCK; v++) {
        words magnitude = (words)x[v] & 0x7fffffff, is_larger = (words)(magnitude > largest);
        largest = (magnitude & is_larger) | (largest & ~is_larger);
    }
    uint32_t bits = largest_of(largest);
    float extreme;
    memcpy(&extreme, &bits, sizeof extreme);
    int is_finite = bits < 0x7f800000;
    floats inverse = broadcast(is_finite && extreme > 1e-35f ? 127 / extreme : 0);
    ints halves[2] = {};
    UNROLLED for (int v = 0; v < PER_BLOCK; v++) {
        floats shifted = x[v] * inverse + 12582912.0f;
        ints rounded = (ints)shifted - 0x4b400000;
        if (!is_finite) rounded = (ints){};
        *(small *)(codes + LANES * v) = __builtin_convertvector(rounded, small);
        halves[v >= PER_BLOCK / 2] += rounded;
    }
    sums[0] = sum_of(halves[0]);
    sums[1] = sum_of(halves[1]);
    return is_finite ? extreme / 127 : NAN;
}

/* Row r of a group of `rows` rows; `integers` and `floats` are the group's. */
static void prepare_row(const product *t, long row, int r, int rows, uint8_t *integers, uint8_t *wide) {
    long n = t->in_size, source = t->sources ? t->sources[row] : row;
    for (long b = 0; b < n / BLOCK; b++) {
        floats block[PER_BLOCK];
        const uint8_t *at = (const uint8_t *)t->x + (source * n + b * BLOCK) * (t->is_bfloat16 ? 2 : 4);
        UNROLLED for (int v = 0; v < PER_BLOCK; v++)
            block[v] = load_values(t->is_bfloat16, at + (t->is_bfloat16 ? 2 : 4) * LANES * v);
        if (integers) {
            uint8_t *record = integers + b * rows * INTEGER_BYTES;
            float *numbers = (float *)(record + rows * BLOCK);
            int32_t sums[2];
            float scale = quantize_block(block, (int8_t *)record + r * BLOCK, sums);
            numbers[r] = scale;
            ((int32_t *)numbers)[rows + r] = sums[0] + sums[1];
            numbers[2 * rows + r] = scale * (float)(sums[0] + sums[1]);
            for (int half = 0; half < 2; half++) {
                ((int32_t *)numbers)[(3 + half) * rows + r] = sums[half];
                numbers[(5 + half) * rows + r] = scale * (float)sums[half];
            }
        }
        if (wide) {
            float *values = (float *)(wide + b * rows * FLOAT_BYTES), *totals = values + rows * BLOCK;
            memcpy(values + r * BLOCK, block, sizeof block);
            floats halves[2] = {};
            UNROLLED for (int v = 0; v < PER_BLOCK; v++) halves[v >= PER_BLOCK / 2] += block[v];
            float sums[2] = {0, 0};
            for (int half = 0; half < 2; half++)
                for (int i = 0; i < LANES; i++) sums[half] += halves[half][i];
            totals[r] = sums[0] + sums[1];
            totals[rows + r] = sums[0];
            totals[2 * rows + r] = sums[1];
        }
    }
}

static void prepare_group(const product *t, long group) {
    long first = first_row(t, group), at = first * (t->in_size / BLOCK);
    int rows = (int)(first_row(t, group + 1) - first);
    for (int r = 0; r < rows; r++)
        prepare_row(t, first + r, r, rows, t->integers ? (uint8_t *)t->integers + at * INTEGER_BYTES : 0,
                    t->floats ? (uint8_t *)t->floats + at * FLOAT_BYTES : 0);
}

/* ---- what Python calls ---- */

static long num_pairs(const piece *p) { return (p->num_outputs + 2 * TILE - 1) / (2 * TILE); }

/* A pass over the weights takes as many rows as stay in the second-level cache. */
enum {
    PASS_BYTES = 512 << 10,
    CHUNKS_PER_THREAD = 4, /* of many rows, so that a delayed thread is helped */
    FEW_GROUPS = 4,        /* of rows: up to here memory is waited for, and a thread's tiles should lie together */
    SPREAD_FROM = 65536 /* values, from which a loop over them is worth another thread */
};

/* Groups of rows of some products, which take no tile together. */
typedef struct {
    const product *products;
    long first_group, last_group, pairs, chunks;
} pass;

static void pass_chunk(void *task, long chunk) {
    const pass *s = task;
    const product *t = s->products;
    long pair = part_begin(s->pairs, chunk, s->chunks), end = part_begin(s->pairs, chunk + 1, s->chunks), before = 0;
    for (; pair < end; t++)
        for (const piece *p = t->pieces; pair < end && p < t->pieces + t->num_pieces; before += num_pairs(p), p++)
            for (; pair < end && pair - before < num_pairs(p); pair++)
                PRODUCTS[p->code](t, p, 2 * (pair - before), s->first_group, s->last_group);
}

static long pairs_of(const product *t) {
    long pairs = 0;
    for (long i = 0; i < t->num_pieces; i++) pairs += num_pairs(t->pieces + i);
    return pairs;
}

static void multiply_groups(const product *t, long first_group, long last_group, int threads) {
    long pairs = pairs_of(t), chunks = threads;
    if (threads > 1 && last_group - first_group > FEW_GROUPS) chunks *= CHUNKS_PER_THREAD;
    pass s = {t, first_group, last_group, pairs, chunks < pairs ? chunks : pairs};
    parallel_for(pass_chunk, &s, s.chunks, threads);
}

static void prepare(void *product_, long group) { prepare_group(product_, group); }

/* What the inputs of products are prepared as. */
typedef struct {
    int quantizes, widens;
} forms;

static forms forms_of(const piece *pieces, long num_pieces, int is_exact) {
    long num_floats = 0;
    for (long i = 0; i < num_pieces; i++) num_floats += pieces[i].code >= BFLOAT16;
    return (forms){!is_exact && num_floats < num_pieces, is_exact || num_floats > 0};
}

/* Memory for the groups of `rows` rows, which `t` is told of; null where there is none. */
static uint8_t *group_memory(product *t, forms f, long rows) {
    long blocks = t->in_size / BLOCK;
    size_t size = rows * blocks * (f.quantizes * INTEGER_BYTES + f.widens * FLOAT_BYTES);
    uint8_t *memory = aligned_alloc(64, (size + 63) / 64 * 64);
    t->integers = f.quantizes ? memory : 0;
    t->floats = f.widens ? memory + f.quantizes * rows * blocks * INTEGER_BYTES : 0;
    return memory;
}

/* Groups of a pass. */
static long groups_at_once(const product *t, forms f) {
    long rows = PASS_BYTES / (t->in_size / BLOCK * (f.widens ? FLOAT_BYTES : INTEGER_BYTES));
    return (rows < 4 * ROWS ? 4 * ROWS : rows) / ROWS;
}

/* y [rows, y_stride] = x [rows, in_size] Wᵀ + bias, all contiguous and float32 or bfloat16; in_size is a multiple of 32.
 * Returns 0, or 1 where there is no memory. */
int packed_product(const void *x, const piece *pieces, long num_pieces, const void *bias, void *y, long rows,
                   long in_size, long y_stride, int is_bfloat16, int is_exact, int threads) {
    product t = {pieces, num_pieces, rows, in_size, y_stride, 0, 0, x, 0, bias, y, is_bfloat16};
    forms f = forms_of(pieces, num_pieces, is_exact);
    uint8_t *memory = group_memory(&t, f, rows);
    if (!memory) return 1;
    long groups = num_groups(rows), at_once = groups_at_once(&t, f);
    parallel_for(prepare, &t, groups, rows * in_size > SPREAD_FROM ? threads : 1);
    for (long group = 0; group < groups; group += at_once)
        multiply_groups(&t, group, group + at_once < groups ? group + at_once : groups, threads);
    free(memory);
    return 0;
}

/* ---- a stack of matrices ---- */

static void prepare_product(void *products, long index) {
    const product *t = (const product *)products + index;
    for (long group = 0; group < num_groups(t->rows); group++) prepare_group(t, group);
}

/* A matrix with rows of its own is a product; one with more rows than a pass takes is several. Returns how many. */
static long stack_products(const product *whole, long pieces_each, const int32_t *ends, long matrices, long most_rows,
                           product *products) {
    long count = 0, element = whole->is_bfloat16 ? 2 : 4, blocks = whole->in_size / BLOCK;
    for (long matrix = 0, row = 0; matrix < matrices; matrix++)
        for (long rows; row < ends[matrix]; row += rows, count++) {
            rows = ends[matrix] - row < most_rows ? ends[matrix] - row : most_rows;
            product *t = products + count;
            *t = *whole;
            t->pieces += matrix * pieces_each, t->num_pieces = pieces_each, t->rows = rows;
            if (t->integers) t->integers += row * blocks * INTEGER_BYTES;
            if (t->floats) t->floats += row * blocks * FLOAT_BYTES;
            if (t->sources) t->sources += row;
            else t->x = (const uint8_t *)t->x + row * t->in_size * element;
            if (t->bias) t->bias = (const uint8_t *)t->bias + matrix * t->y_stride * element;
            t->y = (uint8_t *)t->y + row * t->y_stride * element;
        }
    return count;
}

/* As `packed_product`, where rows up to ends[m] and from ends[m - 1] on meet matrix m, of `pieces_each` pieces, and row
 * m of the bias [matrices, y_stride]. Row i of the product is row sources[i] of x, or row i. */
int packed_stack_product(const void *x, const int64_t *sources, const piece *pieces, long pieces_each,
                         const int32_t *ends, long matrices, const void *bias, void *y, long in_size, long y_stride,
                         int is_bfloat16, int is_exact, int threads) {
    long rows = ends[matrices - 1];
    product whole = {pieces, 0, rows, in_size, y_stride, 0, 0, x, sources, bias, y, is_bfloat16};
    forms f = forms_of(pieces, pieces_each * matrices, is_exact);
    long most_rows = groups_at_once(&whole, f) * ROWS;
    uint8_t *memory = group_memory(&whole, f, rows);
    product *products = malloc((matrices + rows / most_rows) * sizeof *products);
    if (memory && products) {
        long count = stack_products(&whole, pieces_each, ends, matrices, most_rows, products);
        parallel_for(prepare_product, products, count, rows * in_size > SPREAD_FROM ? threads : 1);
        long pairs = 0;
        for (long i = 0; i < count; i++) pairs += pairs_of(products + i);
        long chunks = threads > 1 ? threads * CHUNKS_PER_THREAD : 1;
        pass s = {products, 0, most_rows, pairs, chunks < pairs ? chunks : pairs};
        parallel_for(pass_chunk, &s, s.chunks, threads);
    }
    int failed = !memory || !products;
    free(products);
    free(memory);
    return failed;
}

/* Bytes of a tile, so that Python need not know the layout. */
long packed_tile_bytes(const piece *p, long in_size) {
    cursor c = {0};
    for (long b = 0; b < in_size / BLOCK; b++) advance(p, p->code, &c);
    return (long)c.next;
}

static void pack_planes(int code, const uint8_t *codes, long in_size, long outputs, uint8_t *planes) {
    memset(planes, 0, plane_bytes(code));
    for (int o = 0; o < outputs; o++)
        for (int i = 0; i < BLOCK; i++) {
            int s = i / STEP, at = o * STEP + i % STEP, value = codes[o * in_size + i];
            if (code == U8) {
                planes[64 * s + at] = value;
            } else if (code == U2 || code == U3) {
                planes[64 * (s % 2) + at] |= (value & 3) << 2 * (s / 2);
                if (code == U3) planes[128 + at] |= (value >> 2 & 1) << s;
            } else {
                planes[64 * (s % 4) + at] |= (value & 15) << (s < 4 ? 0 : 4);
                if (code == U5) planes[256 + at] |= (value >> 4 & 1) << s;
                if (code == U6) planes[256 + 64 * (s % 2) + at] |= (value >> 4 & 3) << 2 * (s / 2);
            }
        }
}

static void pack_floats(int code, const uint8_t *codes, long in_size, long outputs, uint8_t *planes) {
    long width = plane_bytes(code) / BLOCK / TILE;
    memset(planes, 0, plane_bytes(code));
    for (long o = 0; o < outputs; o++)
        for (long i = 0; i < BLOCK; i++)
            memcpy(planes + width * (code == BFLOAT16 ? (i / 2 * TILE + o) * 2 + i % 2 : i * TILE + o),
                   codes + (o * in_size + i) * width, width);
}

static void pack_numbers(const uint8_t *numbers, long width, long stride, long outputs, const uint8_t *target) {
    memset((void *)target, 0, width * TILE);
    for (long o = 0; o < outputs; o++) memcpy((uint8_t *)target + o * width, numbers + o * stride * width, width);
}

typedef struct {
    const piece *piece;
    const uint8_t *codes, *scales, *minima, *sub_scales, *sub_minima;
    long rows, in_size;
    uint8_t *tiles;
} packing;

static void pack_tile(void *task, long tile) {
    const packing *s = task;
    const piece *p = s->piece;
    long blocks = s->in_size / BLOCK, per_block = is_halved(p->code) ? 2 : 1, subs = blocks * per_block;
    long supers = (blocks + p->super_blocks - 1) / p->super_blocks, number = p->scale == SCALE32 ? 4 : 2;
    long width = p->code >= BFLOAT16 ? plane_bytes(p->code) / BLOCK / TILE : 1;
    long o = tile * TILE, outputs = s->rows - o < TILE ? s->rows - o : TILE;
    cursor c = {s->tiles + tile * p->tile_bytes};
    for (long b = 0; b < blocks; b++) {
        advance(p, p->code, &c);
        if (p->scale != UNSCALED && b % p->super_blocks == 0) {
            long at = (o * supers + b / p->super_blocks) * number;
            pack_numbers(s->scales + at, number, supers, outputs, c.scales);
            if (p->has_minimum) pack_numbers(s->minima + at, number, supers, outputs, c.minima);
        }
        for (long half = 0; p->scale == SUB && half < per_block; half++) {
            long at = o * subs + b * per_block + half;
            pack_numbers(s->sub_scales + at, 1, subs, outputs, c.sub_scales + half * TILE);
            if (p->has_minimum) pack_numbers(s->sub_minima + at, 1, subs, outputs, c.sub_minima + half * TILE);
        }
        const uint8_t *block = s->codes + (o * s->in_size + b * BLOCK) * width;
        if (p->code >= BFLOAT16) pack_floats(p->code, block, s->in_size, outputs, (uint8_t *)c.planes);
        else pack_planes(p->code, block, s->in_size, outputs, (uint8_t *)c.planes);
    }
}

/* Write the tiles of `rows` outputs, whose first is a multiple of 16, to `tiles`. Codes [rows, in_size]; scales and
 * minima [rows, supers] in the dtype of their kind; sub-scales and sub-minima [rows, groups] int8. */
void pack_tiles(const piece *p, const uint8_t *codes, const uint8_t *scales, const uint8_t *minima,
                const uint8_t *sub_scales, const uint8_t *sub_minima, long rows, long in_size, uint8_t *tiles,
                int threads) {
    packing s = {p, codes, scales, minima, sub_scales, sub_minima, rows, in_size, tiles};
    parallel_for(pack_tile, &s, (rows + TILE - 1) / TILE, threads);
}

/* One output's way through its tile. */
typedef struct {
    cursor tile;
    int lane;
} row_cursor;

static row_cursor row_start(const piece *p, long output) {
    return (row_cursor){{p->data + output / TILE * p->tile_bytes}, (int)(output % TILE)};
}

/* The weights of the output's next block, float32. */
static void unpack_block(const piece *p, row_cursor *c, float *values) {
    int v = c->lane / LANES, lane = c->lane % LANES, code = p->code, halved = is_halved(code);
    advance(p, code, &c->tile);
    for (int half = 0; half < 2; half++) {
        floats scale = broadcast(1), minimum = {};
        if (p->scale != UNSCALED) scale = scale_of(p, &c->tile, v, halved ? half : 0);
        if (p->has_minimum) minimum = minimum_of(p, &c->tile, v, halved ? half : 0);
        for (int i = half * BLOCK / 2; i < (half + 1) * BLOCK / 2; i++) {
            float value;
            if (code >= BFLOAT16) {
                int j = i % inputs_side_by_side(code);
                value = load_float_codes(code, float_codes_of(p, code, &c->tile, v), i - j, j)[lane] * code_factor(code);
            } else {
                bytes w = step_codes(code, c->tile.planes + 4 * LANES * v, i / STEP, p->values);
                value = (float)(w[lane * STEP + i % STEP] - p->zero);
            }
            values[i] = value * scale[lane] + minimum[lane];
        }
    }
}

typedef struct {
    const piece *piece;
    const int64_t *ids;
    long in_size;
    void *rows;
    int is_bfloat16;
} lookup_task;

static void look_up(void *task, long i) {
    const lookup_task *s = task;
    row_cursor c = row_start(s->piece, s->ids[i]);
    for (long at = i * s->in_size; at < (i + 1) * s->in_size; at += BLOCK) {
        float block[BLOCK];
        unpack_block(s->piece, &c, block);
        if (!s->is_bfloat16) memcpy((float *)s->rows + at, block, sizeof block);
        else
            for (long j = 0; j < BLOCK; j++) ((uint16_t *)s->rows)[at + j] = to_bfloat16(block[j]);
    }
}

/* Rows [count, in_size] of float32 or bfloat16, by int64 ids below the outputs of the piece. */
void packed_rows(const piece *p, const int64_t *ids, long count, long in_size, void *rows, int is_bfloat16, int threads) {
    lookup_task s = {p, ids, in_size, rows, is_bfloat16};
    parallel_for(look_up, &s, count, count * in_size > SPREAD_FROM ? threads : 1);
}
