/* Products of a pair of tiles, for one kind of code; packed_product.c calls them.
 *
 * Built for one code of packed.h, -DCODE=U4, and of integer codes also with -DEXACT. With quantized activations each
 * row's 32 inputs become integers of -127 to 127 and a scale, as llama.cpp does, and sums within a block are exact. The
 * exact way widens codes to float in registers. A row's arithmetic is the same whatever rows are beside it.
 */
#include "packed.h"
#include "packed_dots.h"

#ifdef EXACT
enum { IS_EXACT = 1 };
#else
enum { IS_EXACT = 0 };
#endif

/* ---- the products: `vectors` of a pair of tiles from `v0` on, for rows `r0` to `r0 + rows`; all constants but r0 ---- */

/* A block, or where halves have scales of their own the half of it: its sums of products times scales. */
INLINE void integer_sums(const piece *p, int code, const cursor *c, const uint8_t *x, int half, int rows, int v0,
                         int vectors, floats sums[ROWS][PAIR]) {
    int halved = is_halved(code);
    const float *numbers = (const float *)(x + rows * BLOCK), *x_scales = numbers;
    const int32_t *x_sums = (const int32_t *)numbers + rows * (halved ? 3 + half : 1);
    const float *totals = numbers + rows * (halved ? 5 + half : 2);
    ints whole[ROWS][PAIR];
    block_dots(p, code, c, x, x_sums, half, rows, v0, vectors, whole);
    UNROLLED for (int v = 0; v < vectors; v++) {
        floats scale = scale_of(p, c, v0 + v, half);
        UNROLLED for (int r = 0; r < rows; r++)
            sums[r][v] += __builtin_convertvector(whole[r][v], floats) * (scale * broadcast(x_scales[r]));
        if (p->has_minimum) {
            floats minimum = minimum_of(p, c, v0 + v, half);
            UNROLLED for (int r = 0; r < rows; r++) sums[r][v] += minimum * broadcast(totals[r]);
        }
    }
}

/* Groups of rows that meet a pair of tiles take turns in asking for the lines of the next pair, so that memory is read all
 * the while; a group whose index is beyond the count asks for nothing. */
typedef struct {
    int index, count;
} turn;
enum { MOST_TURNS = 8 };

INLINE void ask_for_line(const piece *p, const uint8_t *line, int v0, int vectors) {
    UNROLLED for (int tile = v0 / PER_TILE; tile <= (v0 + vectors - 1) / PER_TILE; tile++)
        __builtin_prefetch(line + (2 + tile) * p->tile_bytes);
}

/* Ask for the same bytes of the next pair of tiles, of those tiles that vectors from `v0` on lie in: a tile is too short
 * for the processor to see that memory is read in order. */
INLINE void ask_for(const piece *p, const uint8_t *block, const uint8_t *end, int v0, int vectors, turn asks) {
    if (v0 % PER_TILE) return; /* asked by the tile's first vectors */
    if (asks.count == 1) { /* a step that is no variable */
        for (; block < end; block += 64) ask_for_line(p, block, v0, vectors);
    } else {
        for (block += 64 * asks.index; block < end; block += 64 * asks.count) ask_for_line(p, block, v0, vectors);
    }
}

INLINE void integer_tile(const product *t, const piece *p, int code, const uint8_t *tile, long r0, int rows, int v0,
                         int vectors, turn asks, floats out[ROWS][PAIR]) {
    long blocks = t->in_size / BLOCK;
    const uint8_t *x = t->integers + r0 * blocks * INTEGER_BYTES;
    floats sums[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) sums[r][v] = (floats){};
    cursor c = {tile};
    for (long b = 0; b < blocks; b++, x += rows * INTEGER_BYTES) {
        const uint8_t *block = c.next;
        advance(p, code, &c);
        if (asks.index < asks.count) ask_for(p, block, c.next, v0, vectors, asks);
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
        UNROLLED for (int v = 0; v < vectors; v++) w[v] = output_codes(code, vector_planes(p, c, v0 + v), s, p->values);
        UNROLLED for (int j = 0; j < STEP; j++) {
            floats wide[PAIR];
            UNROLLED for (int v = 0; v < vectors; v++) {
                ints codes = (ints)((words)w[v] >> 8 * j & 255);
                if (code == FRACTIONS) wide[v] = fractions_at(p->fractions, codes);
                else wide[v] = __builtin_convertvector(codes - p->zero, floats);
            }
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
                       int vectors, turn asks, floats out[ROWS][PAIR]) {
    long blocks = t->in_size / BLOCK;
    const uint8_t *x = t->floats + r0 * blocks * FLOAT_BYTES;
    floats sums[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) sums[r][v] = (floats){};
    cursor c = {tile};
    for (long b = 0; b < blocks; b++, x += rows * FLOAT_BYTES) {
        const uint8_t *block = c.next;
        advance(p, code, &c);
        if (asks.index < asks.count) ask_for(p, block, c.next, v0, vectors, asks);
        exact_sums(p, code, &c, (const float *)x, 0, rows, v0, vectors, sums);
        if (is_halved(code)) exact_sums(p, code, &c, (const float *)x, 1, rows, v0, vectors, sums);
    }
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++) out[r][v0 + v] = sums[r][v];
}

INLINE void float_tile(const product *t, const piece *p, int code, const uint8_t *tile, long r0, int rows, int v0,
                       int vectors, turn asks, floats out[ROWS][PAIR]) {
    long blocks = t->in_size / BLOCK;
    const uint8_t *x = t->floats + r0 * blocks * FLOAT_BYTES;
    int scaled = code == FLOAT8_E4M3FN || code == FLOAT8_E5M2, side_by_side = inputs_side_by_side(code);
    floats sums[ROWS][PAIR], part[ROWS][PAIR];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int v = 0; v < vectors; v++)
        sums[r][v] = part[r][v] = (floats){};
    cursor c = {tile};
    for (long b = 0; b < blocks; b++, x += rows * FLOAT_BYTES) {
        const float *values = (const float *)x;
        const uint8_t *block = c.next;
        advance(p, code, &c);
        if (asks.index < asks.count) ask_for(p, block, c.next, v0, vectors, asks);
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

/* ---- outputs ---- */

/* The first `count` of the numbers at `x`, at most LANES of them. */
INLINE floats load_first(int is_bfloat16, const uint8_t *x, long count) {
    if (count >= LANES) return load_values(is_bfloat16, x);
    uint8_t numbers[4 * LANES] = {0};
    if (count > 0) memcpy(numbers, x, count * (is_bfloat16 ? 2 : 4));
    return load_values(is_bfloat16, numbers);
}

INLINE void store_first(int is_bfloat16, uint8_t *x, long count, floats value) {
    if (count >= LANES) {
        store_values(is_bfloat16, x, value);
    } else if (count > 0) {
        uint8_t numbers[4 * LANES];
        store_values(is_bfloat16, numbers, value);
        memcpy(x, numbers, count * (is_bfloat16 ? 2 : 4));
    }
}

INLINE void store_rows(const product *t, int is_bfloat16, long first, long count, long r0, int rows,
                       const floats out[ROWS][PAIR]) {
    const long width = is_bfloat16 ? 2 : 4;
    const uint8_t *bias = t->bias ? (const uint8_t *)t->bias + width * first : 0;
    uint8_t *y = (uint8_t *)t->y + width * (r0 * t->y_stride + first);
    UNROLLED for (int v = 0; v < PAIR; v++) {
        long left = count - LANES * v, at = width * LANES * v;
        floats added = broadcast(-0.0f); /* leaves any number as it is */
        if (bias) added = load_first(is_bfloat16, bias + at, left);
        for (int r = 0; r < rows; r++)
            store_first(is_bfloat16, y + width * r * t->y_stride + at, left, out[r][v] + added);
    }
}

static __attribute__((noinline)) void store_outputs(const product *t, const piece *p, long tile, long r0, int rows,
                                                    const floats out[ROWS][PAIR]) {
    long first = p->first_output + tile * TILE, count = p->num_outputs - tile * TILE;
    if (t->is_bfloat16) store_rows(t, 1, first, count, r0, rows, out);
    else store_rows(t, 0, first, count, r0, rows, out);
}

/* ---- one tile for a block of rows ---- */

/* What the registers hold beside the sums of these rows. */
INLINE int vectors_at_once(int rows, int code) {
    if (LANES == 4 && REGISTERS == 32) return rows <= 3 ? 4 : 2;
    return REGISTERS == 32 || rows <= 2 || code >= BFLOAT16 ? 2 : 1;
}

INLINE void tile_of_rows(const product *t, const piece *p, int code, long tile, long r0, int rows, turn asks) {
    floats out[ROWS][PAIR];
    const uint8_t *data = p->data + tile * p->tile_bytes;
    int vectors = vectors_at_once(rows, code);
    for (int v0 = 0; v0 < PAIR; v0 += vectors) {
        if (code >= BFLOAT16) float_tile(t, p, code, data, r0, rows, v0, vectors, asks, out);
        else if (IS_EXACT) exact_tile(t, p, code, data, r0, rows, v0, vectors, asks, out);
        else integer_tile(t, p, code, data, r0, rows, v0, vectors, asks, out);
    }
    store_outputs(t, p, tile, r0, rows, out);
}

/* See `tile_product`. */
void packed_tiles(const product *t, const piece *p, long tile, long first_group, long last_group) {
    long end = num_groups(t->rows) < last_group ? num_groups(t->rows) : last_group;
    int turns = end - first_group < MOST_TURNS ? (int)(end - first_group) : MOST_TURNS;
    for (long group = first_group; group < end; group++) {
        long first = first_row(t, group);
        turn asks = {(int)(group - first_group), turns};
        switch (first_row(t, group + 1) - first) {
        case 1: tile_of_rows(t, p, CODE, tile, first, 1, asks); break;
        case 2: tile_of_rows(t, p, CODE, tile, first, 2, asks); break;
        case 3: tile_of_rows(t, p, CODE, tile, first, 3, asks); break;
        case 4: tile_of_rows(t, p, CODE, tile, first, 4, asks); break;
        case 5: tile_of_rows(t, p, CODE, tile, first, 5, asks); break;
        case 6: tile_of_rows(t, p, CODE, tile, first, 6, asks); break;
        }
    }
}
