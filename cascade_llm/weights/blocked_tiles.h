/* The blocked product in tile registers (AMX-BF16), for three rows and more; part of blocked.c at that level.
 *
 * 16 pairs of inputs of 16 outputs are a tile as they lie, and so are 32 inputs of up to 16 rows of x. Tiles 0 to 3 are
 * sums, of two tiles of rows by two of outputs, or of one by four; where rows end with a part of a tile, rows before
 * them are multiplied again. A row's arithmetic is the same in each.
 */
#include "tiles.h"

enum { DEPTH = 32 }; /* inputs that a tile takes */

/* Sums begin as the bias: a tile whose rows are all the same. */
#define START(sum, vector) _tile_loadd(sum, start + (vector) * LANES, 0)
#define STORE(sum, row, vector)                                                            \
    do {                                                                                   \
        _tile_stored(sum, sums, TILE_ROW_BYTES);                                           \
        store_tile(y + (row) * out_size + (vector) * LANES, sums, rows, out_size);         \
    } while (0)

static inline void store_tile(bfloat16 *y, const float *sums, int rows, long out_size) {
    for (int r = 0; r < rows; r++)
        _mm256_storeu_si256((__m256i *)(y + r * out_size),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + r * LANES)));
}

/* Where the tile of the `v`th vector of outputs begins for inputs from `i` on. */
static inline __attribute__((always_inline)) const bfloat16 *weights_at(const bfloat16 *w, long in_size, long i, int v,
                                                                        int block) {
    return w + v * LANES / block * block * in_size + i * block + v * LANES % block * 2;
}

/* Ask for `lines` cache lines. */
static inline __attribute__((always_inline)) void ask_for(const bfloat16 *next, int lines) {
    for (int line = 0; line < lines; line++) _mm_prefetch((const char *)(next + line * 2 * LANES), _MM_HINT_T1);
}

/* 32 outputs of 32 rows, those of `x` and those `second` rows further on; `next`: UNIT outputs' weights to ask for, or null. */
static inline __attribute__((always_inline)) void tiles_of_two(const bfloat16 *x, const bfloat16 *w, const float *start,
                                                               bfloat16 *y, long second, long in_size, long out_size,
                                                               int block, const bfloat16 *next) {
    const int rows = TILE_ROWS;
    const long x_bytes = in_size * 2, w_bytes = block * 4;
    const bfloat16 *below = x + second * in_size;
    float sums[TILE_ROWS * LANES] __attribute__((aligned(64)));
    START(0, 0);
    START(1, 1);
    START(2, 0);
    START(3, 1);
    for (long i = 0; i < in_size; i += DEPTH) {
        _tile_loadd(6, weights_at(w, in_size, i, 0, block), w_bytes);
        _tile_loadd(7, weights_at(w, in_size, i, 1, block), w_bytes);
        _tile_loadd(4, x + i, x_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below + i, x_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (next) ask_for(next + i * UNIT, DEPTH);
    }
    STORE(0, 0, 0);
    STORE(1, 0, 1);
    STORE(2, second, 0);
    STORE(3, second, 1);
}

/* `vectors` * 16 outputs, 32 or 64, of one tile of rows. */
static inline __attribute__((always_inline)) void tiles_of_one(const bfloat16 *x, const bfloat16 *w, const float *start,
                                                               bfloat16 *y, int rows, long in_size, long out_size,
                                                               int vectors, int block, const bfloat16 *next) {
    const long x_bytes = in_size * 2, w_bytes = block * 4;
    float sums[TILE_ROWS * LANES] __attribute__((aligned(64)));
    START(0, 0);
    START(1, 1);
    if (vectors == 4) {
        START(2, 2);
        START(3, 3);
    }
    for (long i = 0; i < in_size; i += DEPTH) {
        _tile_loadd(4, x + i, x_bytes);
        _tile_loadd(6, weights_at(w, in_size, i, 0, block), w_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights_at(w, in_size, i, 1, block), w_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if (vectors == 4) {
            _tile_loadd(6, weights_at(w, in_size, i, 2, block), w_bytes);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(7, weights_at(w, in_size, i, 3, block), w_bytes);
            _tile_dpbf16ps(3, 4, 7);
        }
        if (next) ask_for(next + i * vectors * LANES, vectors * LANES);
    }
    STORE(0, 0, 0);
    STORE(1, 0, 1);
    if (vectors == 4) {
        STORE(2, 0, 2);
        STORE(3, 0, 3);
    }
}
#undef START
#undef STORE

/* As `span`, of any number of rows, where in_size is a multiple of DEPTH. */
static inline __attribute__((always_inline)) void span_of_tiles(const bfloat16 *x, const bfloat16 *weight,
                                                                const bfloat16 *bias, bfloat16 *y, long rows, long in_size,
                                                                long out_size, long begin, long end, int block) {
    tile_shapes shapes = {0};
    const int in_tile = rows < TILE_ROWS ? (int)rows : TILE_ROWS;
    const long last = rows - in_tile;
    shape_tiles(&shapes, 0, 5, in_tile, TILE_ROW_BYTES);
    shape_tiles(&shapes, 6, 7, TILE_ROWS, TILE_ROW_BYTES);
    configure_tiles(&shapes);
    for (long out = begin; out < end;) {
        const int whole = rows <= TILE_ROWS && out % WIDE == 0 && out + WIDE <= end;
        const long after = out + (whole ? WIDE : UNIT);
        const bfloat16 *w = first_pairs(weight, in_size, out, block);
        const bfloat16 *next = after + UNIT <= end && after % block == 0 ? weight + after * in_size : 0;
        float start[WIDE] = {0};
        if (bias)
            for (long o = 0; o < after - out; o += LANES) _mm512_storeu_ps(start + o, load(bias + out + o));
        written_for_tiles();
        if (whole) tiles_of_one(x, w, start, y + out, in_tile, in_size, out_size, WIDE / LANES, block, next);
        for (long row = 0; row < rows && !whole; row += 2 * TILE_ROWS, next = 0) {
            long first = row < last ? row : last, second = first + TILE_ROWS < last ? TILE_ROWS : last - first;
            const bfloat16 *from = x + first * in_size;
            bfloat16 *to = y + first * out_size + out;
            if (second) tiles_of_two(from, w, start, to, second, in_size, out_size, block, next);
            else tiles_of_one(from, w, start, to, in_tile, in_size, out_size, UNIT / LANES, block, next);
        }
        out = after;
    }
    _tile_release();
}
