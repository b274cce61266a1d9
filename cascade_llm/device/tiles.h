/* The shapes of the tile registers of AMX; a part of a loop sets them where it begins and calls _tile_release at its end. */
#ifndef CASCADE_TILES_H
#define CASCADE_TILES_H

#include <immintrin.h>
#include <stdint.h>

enum { TILE_ROWS = 16, TILE_ROW_BYTES = 64 };

/* As _tile_loadconfig takes them; all are zero at first but the palette. */
typedef struct {
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_shapes;

static inline void shape_tiles(tile_shapes *shapes, int first, int last, int rows, int row_bytes) {
    shapes->palette = 1;
    for (int tile = first; tile <= last; tile++) {
        shapes->rows[tile] = (uint8_t)rows;
        shapes->row_bytes[tile] = (uint16_t)row_bytes;
    }
}

/* What was written to memory is there before a tile is loaded: GCC does not know that these instructions read memory. */
static inline void written_for_tiles(void) { __asm__ volatile("" ::: "memory"); }

static inline void configure_tiles(const tile_shapes *shapes) {
    written_for_tiles();
    _tile_loadconfig(shapes);
}

#endif
