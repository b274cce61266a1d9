/* Products of bfloat16 in the tile registers of AMX: 16 rows of 16 floats, fed by 16 pairs a row.
 *
 * Tiles 0 to 3 hold sums, 4 a piece of the left matrix, 5 to 7 pieces of the right one in turn: four sums are what
 * covers the time that one product takes. Both matrices lie as words, pairs of bfloat16, as native_attention.c packs
 * them. As in VDPBF16PS, a subnormal number counts as zero.
 */
#ifndef CASCADE_NATIVE_AMX_H
#define CASCADE_NATIVE_AMX_H

#include "native_pages.h"

enum { AMX_ROWS = 16 };

#if defined(PAIRS) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include "tiles.h"

enum { HAS_AMX = 1 };

/* For this thread, before its first product; afterwards close_amx, so that the system need not save them. */
static void open_amx(void) {
    tile_shapes shapes = {0};
    shape_tiles(&shapes, 0, 7, AMX_ROWS, TILE_ROW_BYTES);
    configure_tiles(&shapes);
}

static void close_amx(void) { _tile_release(); }

/* c[i, :] = sum over k of a[i, k] b[k, :], for 16 rows and n times 16 columns; depth: a multiple of 16 words. */
INLINE void amx_columns(const int n, float *c, long c_stride, const float *a, long a_stride, const float *b,
                         long b_stride, long depth) {
    c_stride *= sizeof *c, a_stride *= sizeof *a;
    const long row = b_stride * (long)sizeof *b;
    _tile_zero(0);
    if (n > 1) _tile_zero(1);
    if (n > 2) _tile_zero(2);
    if (n > 3) _tile_zero(3);
    for (long k = 0; k < depth; k += AMX_ROWS, b += AMX_ROWS * b_stride) {
        _tile_loadd(4, a + k, a_stride);
        _tile_loadd(5, b, row);
        _tile_dpbf16ps(0, 4, 5);
        if (n > 1) _tile_loadd(6, b + 16, row);
        if (n > 1) _tile_dpbf16ps(1, 4, 6);
        if (n > 2) _tile_loadd(7, b + 32, row);
        if (n > 2) _tile_dpbf16ps(2, 4, 7);
        if (n > 3) _tile_loadd(5, b + 48, row);
        if (n > 3) _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, c_stride);
    if (n > 1) _tile_stored(1, c + 16, c_stride);
    if (n > 2) _tile_stored(2, c + 32, c_stride);
    if (n > 3) _tile_stored(3, c + 48, c_stride);
}

/* The same for any multiple of 16 columns. */
INLINE void amx_product(float *c, long c_stride, const float *a, long a_stride, const float *b, long b_stride,
                         long depth, long width) {
    written_for_tiles();
    long column = 0;
    for (; column + 64 <= width; column += 64)
        amx_columns(4, c + column, c_stride, a, a_stride, b + column, b_stride, depth);
    if (width - column == 16) amx_columns(1, c + column, c_stride, a, a_stride, b + column, b_stride, depth);
    if (width - column == 32) amx_columns(2, c + column, c_stride, a, a_stride, b + column, b_stride, depth);
    if (width - column == 48) amx_columns(3, c + column, c_stride, a, a_stride, b + column, b_stride, depth);
    written_for_tiles(); /* nor that a store of one writes it */
}

#else
enum { HAS_AMX = 0 };
static void open_amx(void) {}
static void close_amx(void) {}
INLINE void amx_product(float *c, long c_stride, const float *a, long a_stride, const float *b, long b_stride,
                        long depth, long width) {
    (void)c, (void)c_stride, (void)a, (void)a_stride, (void)b, (void)b_stride, (void)depth, (void)width;
}
#endif
#endif
