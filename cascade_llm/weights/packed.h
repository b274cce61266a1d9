/* Matrices kept in few bits: how they lie in memory, and how a block of them is read; for the files packed_*.c.
 *
 * A matrix is a list of pieces, the parts that its checkpoint stored; each has codes of its own kind. A piece lies in
 * tiles of 16 outputs, so that a vector's lanes are outputs and no sum runs across lanes. A tile is a run of blocks of
 * 32 inputs, and one thread reads it from front to back:
 *
 *   super    [16 scales][16 minima]                of float16 or float32, for the blocks that share them; twice as many
 *                                                  where the halves of a block have scales that are no integers
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
 * and 3, 5 and 6 bits are two planes. Where products take eight inputs (USMMLA, IN_EIGHTS), two steps of four outputs are
 * taken together: in 16 bytes stand eight inputs of the first output and of the second, in the next step's those of the
 * third and the fourth. Codes that are floats lie as 16 numbers for each input, bfloat16 as 16 pairs for each two.
 */
#ifndef CASCADE_PACKED_H
#define CASCADE_PACKED_H

#include "vectors.h"

enum { TILE = 16, BLOCK = 32, STEPS = 8, STEP = 4 };

#if defined(__ARM_FEATURE_MATMUL_INT8)
#define IN_EIGHTS 1
#else
#define IN_EIGHTS 0
#endif

enum { SPREAD_FROM = 65536 /* values, from which a loop over them is worth another thread */ };

enum {
    ROWS = 6,               /* at most, that a tile meets at once */
    PER_TILE = TILE / LANES /* vectors */
};

/* Kinds of codes, integers first; names and numbers are those of packed_kernels.py. */
enum code { U2, U3, U4, U5, U6, U8, TABLE, HALVED_TABLE, FRACTIONS, BFLOAT16, FLOAT16, FLOAT8_E4M3FN, FLOAT8_E5M2, FLOAT32 };
enum scale { UNSCALED, SCALE16, SCALE32, SUB };

typedef struct product product;
typedef struct piece piece;

/* The outputs of a pair of tiles, the first of which is tile `tile` of the piece, for rows of those groups. */
typedef void tile_product(const product *t, const piece *p, long tile, long first_group, long last_group);

struct piece {
    const uint8_t *data;
    tile_product *multiply; /* of packed_tiles.c, as it is built for the code */
    long tile_bytes, num_outputs, first_output, super_blocks;
    int32_t code, scale, zero, has_minimum, is_exact; /* takes activations as they are */
    uint8_t values[16];                               /* of TABLE and HALVED_TABLE, with 128 added */
    float fractions[16];                              /* of FRACTIONS */
};

/* Rows of activations lie in groups of as many as a tile takes at once, and within a group block by block, so that one
 * pointer walks them beside the weights. A block of a group of n rows: */
enum {
    INTEGER_BYTES = 64, /* codes int8 [n][32]; scales float [n]; sums of codes int32 [n]; totals (scale * sum) float [n];
                           sums of the two halves int32 [2][n]; their totals float [2][n] */
    FLOAT_BYTES = 144   /* values float [n][32]; totals float [n]; totals of the two halves float [2][n] */
};

struct product {
    const piece *pieces;
    long num_pieces, rows, in_size, y_stride;
    const uint8_t *integers, *floats; /* the groups; a row's share of a block has the bytes above */
    const void *x;
    const int64_t *sources; /* the row of x that each row takes; null: its own */
    const void *bias;
    void *y;
    int is_bfloat16; /* of bias and y, and of x */
    int has_halves;  /* whether sums of halves of blocks are wanted: a code has scales for these */
};

static inline long num_groups(long rows) { return (rows + ROWS - 1) / ROWS; }

/* Rows come in groups as even as they can be. */
static inline long first_row(const product *t, long group) {
    long groups = num_groups(t->rows);
    return group >= groups ? t->rows : t->rows * group / groups;
}

/* ---- what differs between processors ---- */

#if defined(AVX512)

INLINE bytes lookup(const uint8_t *values, bytes codes) {
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values));
    return (bytes)_mm512_shuffle_epi8(table, (__m512i)codes);
}
INLINE floats load_float16(const uint8_t *x) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x)); }
INLINE floats float16_of(halves x) { return (floats)_mm512_cvtph_ps((__m256i)x); }
INLINE floats fractions_at(const float *table, ints places) {
    return (floats)_mm512_permutexvar_ps((__m512i)places, _mm512_loadu_ps(table));
}

#elif defined(__AVX2__)

INLINE bytes lookup(const uint8_t *values, bytes codes) {
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    return (bytes)_mm256_shuffle_epi8(table, (__m256i)codes);
}
INLINE floats load_float16(const uint8_t *x) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x)); }
INLINE floats float16_of(halves x) { return (floats)_mm256_cvtph_ps((__m128i)x); }
INLINE floats fractions_at(const float *table, ints places) {
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)places);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)places);
    return (floats)_mm256_blendv_ps(low, high, (__m256)(places << 28)); /* bit 3, as the sign */
}

#elif defined(__aarch64__)

INLINE bytes lookup(const uint8_t *values, bytes codes) {
    return (bytes)vqtbl1q_u8(vld1q_u8(values), (uint8x16_t)codes);
}
INLINE floats float16_of(halves x) { return (floats)vcvt_f32_f16((float16x4_t)x); }
INLINE floats fractions_at(const float *table, ints places) {
    uint32x4_t at = (uint32x4_t)((words)places * 0x04040404 + 0x03020100); /* of a number's four bytes */
    return (floats)vqtbl4q_u8(vld1q_u8_x4((const uint8_t *)table), vreinterpretq_u8_u32(at));
}
INLINE floats load_float16(const uint8_t *x) {
    halves stored;
    memcpy(&stored, x, sizeof stored);
    return float16_of(stored);
}

#else

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
INLINE floats fractions_at(const float *table, ints places) {
    floats found;
    for (int i = 0; i < LANES; i++) found[i] = table[places[i]];
    return found;
}
INLINE floats load_float16(const uint8_t *x) {
    halves stored;
    memcpy(&stored, x, sizeof stored);
    return float16_of(stored);
}
#endif

/* ---- codes ---- */

INLINE bytes load_bytes(const uint8_t *x) { return *(const bytes *)x; }

/* Bytes that a block's planes take. */
INLINE long plane_bytes(int code) {
    switch (code) {
    case U2: return 128;
    case U3: return 192;
    case U4: case TABLE: case HALVED_TABLE: case FRACTIONS: return 256;
    case U5: return 320;
    case U6: return 384;
    case BFLOAT16: case FLOAT16: return 2 * TILE * BLOCK;
    case FLOAT32: return 4 * TILE * BLOCK;
    default: return 512;
    }
}

INLINE int is_halved(int code) { return code == U2 || code == U3 || code == U6 || code == HALVED_TABLE; }
INLINE int is_table(int code) { return code == TABLE || code == HALVED_TABLE; }
INLINE int is_eight(int code) { return code == U8 || is_table(code); }

/* Bits of every byte, moved from bit `from` to bit `to`; what is outside `mask` is cleared. */
INLINE bytes moved(bytes x, int from, int to, int mask) {
    pairs wide = (pairs)x;
    if (to > from) wide <<= to - from;
    if (from > to) wide >>= from - to;
    return (bytes)wide & (uint8_t)mask;
}

/* In which step an input of a tile's output lies, and where in its 64 bytes. */
INLINE int step_of(int output, int input) {
    return IN_EIGHTS ? input / 8 * 2 + output % 4 / 2 : input / STEP;
}
INLINE int byte_of(int output, int input) {
    return IN_EIGHTS ? output / 4 * 16 + output % 2 * 8 + input % 8 : output * STEP + input % STEP;
}

/* Where input `i` of row `r` lies among the codes of a block of a group of rows; where products take eight inputs of two
 * rows, these lie side by side. */
INLINE long place_of_code(long rows, long r, long i) {
    if (!IN_EIGHTS || (r == rows - 1 && rows % 2)) return r * BLOCK + i;
    return r / 2 * 2 * BLOCK + i / 8 * 16 + r % 2 * 8 + i % 8;
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
        return is_table(code) ? lookup(values, low) : low;
    }
}

/* The codes of one step with a lane for each output. */
INLINE bytes output_codes(int code, const uint8_t *plane, int s, const uint8_t *values) {
#if IN_EIGHTS
    uint32x4_t low = (uint32x4_t)step_codes(code, plane, s / 2 * 2, values);
    uint32x4_t high = (uint32x4_t)step_codes(code, plane, s / 2 * 2 + 1, values);
    return (bytes)(s % 2 ? vuzp2q_u32(low, high) : vuzp1q_u32(low, high));
#else
    return step_codes(code, plane, s, values);
#endif
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

/* LANES float codes of input `i + j` of a block, whose codes begin at `x`; `i` is the first of those side by side. Two
 * inputs' bfloat16 lie side by side for each output, so that a shift and a mask widen them. e4m3 and e5m2 are float16 with fewer digits; e4m3 comes 2**-8 as large,
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
    if (code == FLOAT8_E5M2) return float16_of(__builtin_convertvector(*(const smallest *)(x + TILE * i), halves) << 8);
    shorts wide = __builtin_convertvector(*(const small *)(x + TILE * i), shorts);
    return float16_of((halves)(wide << 7) & 0xbfff);
}

/* LANES numbers of a row of bfloat16 or float32 in memory. */
INLINE floats load_values(int is_bfloat16, const uint8_t *x) {
    if (is_bfloat16) return load_bfloat16((const uint16_t *)x);
    return *(const floats *)x;
}

/* Their numbers back to memory; bfloat16 to the nearest, ties to even, and a NaN stays one. */
INLINE void store_values(int is_bfloat16, uint8_t *x, floats value) {
    if (!is_bfloat16) {
        *(floats *)x = value;
        return;
    }
    words bits = (words)value, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    words is_nan = (words)((ints)(bits & 0x7fffffff) > 0x7f800000);
    *(halves *)x = __builtin_convertvector((quiet & is_nan) | (rounded & ~is_nan), halves);
}

/* What the scales of float codes are multiplied by. */
INLINE float code_factor(int code) { return code == FLOAT8_E4M3FN ? 256.0f : 1.0f; }

/* Where the numbers of a tile lie, as it is walked block by block. */
typedef struct {
    const uint8_t *next, *scales, *minima, *sub_scales, *sub_minima, *planes;
    long left; /* blocks that these scales still serve */
} cursor;

INLINE void advance(const piece *p, int code, cursor *c) {
    int halves = is_halved(code) ? 2 : 1, subs = halves * TILE;
    int head = (p->scale == SCALE32 ? 4 : 2) * TILE * (p->scale == SUB ? 1 : halves);
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
    if (p->scale != SUB) return load_number(p->scale, c->scales + of_pair(p, v) + width * (TILE * half + lane));
    return load_number(p->scale, c->scales + of_pair(p, v) + width * lane) * load_sub(c->sub_scales + of_pair(p, v) + TILE * half + lane);
}

INLINE floats minimum_of(const piece *p, const cursor *c, int v, int half) {
    int width = p->scale == SCALE32 ? 4 : 2, lane = LANES * (v % PER_TILE);
    if (p->scale != SUB) return load_number(p->scale, c->minima + of_pair(p, v) + width * (TILE * half + lane));
    return load_number(p->scale, c->minima + of_pair(p, v) + width * lane) * load_sub(c->sub_minima + of_pair(p, v) + TILE * half + lane);
}

/* Where the float codes of a vector begin in a block; of bfloat16 two inputs lie side by side. */
INLINE const uint8_t *float_codes_of(const piece *p, int code, const cursor *c, int v) {
    long bytes = plane_bytes(code) / BLOCK * inputs_side_by_side(code);
    return c->planes + of_pair(p, v) + bytes / TILE * LANES * (v % PER_TILE);
}

INLINE const uint8_t *vector_planes(const piece *p, const cursor *c, int v) {
    return c->planes + of_pair(p, v) + 4 * LANES * (v % PER_TILE);
}

#endif
