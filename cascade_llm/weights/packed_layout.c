/* Tiles written from codes, and rows of weights read back from them; packed.h says how they lie. */
#include <string.h>

#include "packed.h"
#include "parallel.h"

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
            int s = step_of(o, i), at = byte_of(o, i), value = codes[o * in_size + i];
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
    long heads = p->scale == SUB ? 1 : per_block, number = p->scale == SCALE32 ? 4 : 2;
    long supers = (blocks + p->super_blocks - 1) / p->super_blocks * heads;
    long width = p->code >= BFLOAT16 ? plane_bytes(p->code) / BLOCK / TILE : 1;
    long o = tile * TILE, outputs = s->rows - o < TILE ? s->rows - o : TILE;
    cursor c = {s->tiles + tile * p->tile_bytes};
    for (long b = 0; b < blocks; b++) {
        advance(p, p->code, &c);
        for (long head = 0; p->scale != UNSCALED && b % p->super_blocks == 0 && head < heads; head++) {
            long at = (o * supers + b / p->super_blocks * heads + head) * number, to = head * number * TILE;
            pack_numbers(s->scales + at, number, supers, outputs, c.scales + to);
            if (p->has_minimum) pack_numbers(s->minima + at, number, supers, outputs, c.minima + to);
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
                bytes w = output_codes(code, c->tile.planes + 4 * LANES * v, i / STEP, p->values);
                uint8_t found = w[lane * STEP + i % STEP];
                value = code == FRACTIONS ? p->fractions[found] : (float)(found - p->zero);
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
        long width = s->is_bfloat16 ? 2 : 4;
        for (int j = 0; j < BLOCK; j += LANES)
            store_values(s->is_bfloat16, (uint8_t *)s->rows + width * (at + j), *(const floats *)(block + j));
    }
}

/* Rows [count, in_size] of float32 or bfloat16, by int64 ids below the outputs of the piece. */
void packed_rows(const piece *p, const int64_t *ids, long count, long in_size, void *rows, int is_bfloat16, int threads) {
    lookup_task s = {p, ids, in_size, rows, is_bfloat16};
    parallel_for(look_up, &s, count, count * in_size > SPREAD_FROM ? threads : 1);
}

