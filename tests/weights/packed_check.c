/* The packed products against sums in double, without Python: for processors that are only emulated here.
 *
 * Every kind of code with random numbers: groups of 1 to 6 rows of 512 inputs, 37 outputs. Prints one line for each that is
 * wrong.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "packed.h"

int packed_product(const void *x, const piece *pieces, long num_pieces, const void *bias, void *y, long rows,
                   long in_size, long y_stride, int is_bfloat16, int threads);
long packed_tile_bytes(const piece *p, long in_size);
void pack_tiles(const piece *p, const uint8_t *codes, const uint8_t *scales, const uint8_t *minima,
                const uint8_t *sub_scales, const uint8_t *sub_minima, long rows, long in_size, uint8_t *tiles,
                int threads);
void packed_rows(const piece *p, const int64_t *ids, long count, long in_size, void *rows, int is_bfloat16, int threads);
tile_product packed_tiles_u2, packed_tiles_u3, packed_tiles_u4, packed_tiles_u5, packed_tiles_u6, packed_tiles_u8;
tile_product packed_tiles_u2_exact, packed_tiles_u3_exact, packed_tiles_u4_exact, packed_tiles_u5_exact;
tile_product packed_tiles_u6_exact, packed_tiles_u8_exact, packed_tiles_table, packed_tiles_table_exact;
tile_product packed_tiles_halved_table, packed_tiles_halved_table_exact, packed_tiles_fractions_exact;
tile_product packed_tiles_bfloat16, packed_tiles_float16, packed_tiles_float8_e4m3fn, packed_tiles_float8_e5m2;
tile_product packed_tiles_float32;

/* By code; the exact products behind. */
static tile_product *const PRODUCTS[2][FLOAT32 + 1] = {
    {packed_tiles_u2, packed_tiles_u3, packed_tiles_u4, packed_tiles_u5, packed_tiles_u6, packed_tiles_u8,
     packed_tiles_table, packed_tiles_halved_table, packed_tiles_fractions_exact, packed_tiles_bfloat16, packed_tiles_float16, packed_tiles_float8_e4m3fn,
     packed_tiles_float8_e5m2, packed_tiles_float32},
    {packed_tiles_u2_exact, packed_tiles_u3_exact, packed_tiles_u4_exact, packed_tiles_u5_exact, packed_tiles_u6_exact,
     packed_tiles_u8_exact, packed_tiles_table_exact, packed_tiles_halved_table_exact, packed_tiles_fractions_exact,
     packed_tiles_bfloat16, packed_tiles_float16,
     packed_tiles_float8_e4m3fn, packed_tiles_float8_e5m2, packed_tiles_float32},
};

enum { OUTPUTS = 37, INPUTS = 512, MOST_ROWS = 7 };
/* Of products: rows that meet a tile together are 1, 2, 5, 6, and 4 and 3. */
static const long NUM_ROWS[] = {1, 2, 5, 6, 7};

typedef struct {
    const char *name;
    int code, scale, zero, has_minimum, super_blocks, num_codes;
} kind;

static const kind KINDS[] = {
    {"q4_0", U4, SCALE16, 8, 0, 1, 16},     {"q4_1", U4, SCALE16, 0, 1, 1, 16},
    {"q5_0", U5, SCALE16, 16, 0, 1, 32},    {"q8_0", U8, SCALE16, 128, 0, 1, 256},
    {"q2_k", U2, SUB, 0, 1, 8, 4},          {"q3_k", U3, SUB, 4, 0, 8, 8},
    {"q4_k", U4, SUB, 0, 1, 8, 16},         {"q5_k", U5, SUB, 0, 1, 8, 32},
    {"q6_k", U6, SUB, 32, 0, 8, 64},        {"groups of 128", U4, SCALE32, 0, 1, 4, 16},
    {"halved table", HALVED_TABLE, SCALE32, 128, 0, 1, 16}, {"fractions", FRACTIONS, SCALE32, 0, 0, 2, 16},
    {"halves of six bits", U6, SCALE32, 32, 1, 1, 64},
    {"table", TABLE, SCALE16, 128, 0, 1, 16}, {"bfloat16", BFLOAT16, UNSCALED, 0, 0, 1, 0},
    {"float16", FLOAT16, UNSCALED, 0, 0, 1, 0}, {"float32", FLOAT32, UNSCALED, 0, 0, 1, 0},
    {"e4m3", FLOAT8_E4M3FN, SCALE32, 0, 0, 4, 0},    {"e5m2", FLOAT8_E5M2, SCALE32, 0, 0, 4, 0},
};

static uint32_t state = 1;
static uint32_t random_bits(void) { return (state = state * 1664525u + 1013904223u) >> 8; }
static float uniform(void) { return (float)(random_bits() & 0xffff) / 65536.0f; }

static float rounded_to_float16(float x, uint16_t *bits) {
    _Float16 value = (_Float16)x;
    memcpy(bits, &value, sizeof *bits);
    return (float)value;
}

static float of_float16(uint16_t bits) {
    _Float16 value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

/* A random code, written to `at` in its own width; returns what it stands for before scales. */
static double random_code(const kind *k, const piece *p, uint8_t *at) {
    uint8_t byte = (uint8_t)random_bits();
    uint16_t bits;
    float value = uniform() - 0.5f;
    switch (k->code) {
    case BFLOAT16: {
        uint32_t whole;
        memcpy(&whole, &value, 4);
        whole &= 0xffff0000;
        memcpy(at, (uint8_t *)&whole + 2, 2);
        memcpy(&value, &whole, 4);
        return value;
    }
    case FLOAT16: value = rounded_to_float16(value, &bits); memcpy(at, &bits, 2); return value;
    case FLOAT32: memcpy(at, &value, 4); return value;
    case FLOAT8_E5M2:
        if ((byte & 0x7c) == 0x7c) byte &= 0xbb;
        *at = byte;
        return of_float16((uint16_t)(byte << 8));
    case FLOAT8_E4M3FN: {
        if ((byte & 0x7f) == 0x7f) byte ^= 1;
        *at = byte;
        int exponent = byte >> 3 & 15, digits = byte & 7;
        double size = exponent ? ldexp(1 + digits / 8.0, exponent - 7) : ldexp(digits / 8.0, -6);
        return byte & 0x80 ? -size : size;
    }
    case FRACTIONS: *at = byte % 16; return p->fractions[*at];
    default: *at = (uint8_t)(byte % k->num_codes); return (is_table(k->code) ? p->values[*at] : *at) - k->zero;
    }
}

/* A scale or a minimum, written as its kind is stored. */
static float random_number(int scale, float x, uint8_t *numbers, int index) {
    if (scale == SCALE32) {
        memcpy(numbers + 4 * index, &x, 4);
        return x;
    }
    return rounded_to_float16(x, (uint16_t *)numbers + index);
}

/* The largest error of a product, over the largest output. */
static double error_of(const float *x, const float *y, long rows, double weight[OUTPUTS][INPUTS]) {
    double worst = 0, largest = 0;
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTPUTS; o++) {
            double sum = 0;
            for (int i = 0; i < INPUTS; i++) sum += x[r * INPUTS + i] * weight[o][i];
            double error = fabs(sum - y[r * OUTPUTS + o]);
            if (!(error <= worst)) worst = error;
            if (fabs(sum) > largest) largest = fabs(sum);
        }
    return worst / largest;
}

static int is_wrong(const kind *k) {
    static uint8_t codes[OUTPUTS * INPUTS * 4];
    static _Alignas(4) uint8_t scales[OUTPUTS * 128], minima[OUTPUTS * 128];
    static int8_t sub_scales[OUTPUTS * 32], sub_minima[OUTPUTS * 32];
    static double weight[OUTPUTS][INPUTS];
    static float x[MOST_ROWS * INPUTS], y[MOST_ROWS * OUTPUTS], looked_up[3 * INPUTS];
    piece p = {.num_outputs = OUTPUTS, .super_blocks = k->super_blocks, .code = k->code, .scale = k->scale};
    p.zero = k->zero, p.has_minimum = k->has_minimum;
    for (int i = 0; i < 16; i++) p.values[i] = (uint8_t)(i * 15 + 3), p.fractions[i] = (float)(i - 7) / 9;
    p.tile_bytes = packed_tile_bytes(&p, INPUTS);
    int width = k->code >= BFLOAT16 ? (int)(plane_bytes(k->code) / BLOCK / TILE) : 1, wrong = 0;
    int group_len = is_halved(k->code) ? BLOCK / 2 : BLOCK;
    int super_len = (k->scale == SUB ? BLOCK : group_len) * k->super_blocks;
    for (int o = 0; o < OUTPUTS; o++) {
        float scale = 1, minimum = 0, sub_scale = 1, sub_minimum = 1;
        for (int i = 0; i < INPUTS; i++) {
            int super = o * (INPUTS / super_len) + i / super_len, group = o * (INPUTS / group_len) + i / group_len;
            if (k->scale != UNSCALED && i % super_len == 0) {
                scale = random_number(k->scale, uniform() / 8, scales, super);
                minimum = random_number(k->scale, -uniform(), minima, super);
            }
            if (k->scale == SUB && i % group_len == 0) {
                sub_scale = sub_scales[group] = (int8_t)(random_bits() % 64) - (k->has_minimum ? 0 : 32);
                sub_minimum = sub_minima[group] = (int8_t)(random_bits() % 64);
            }
            double code = random_code(k, &p, codes + (o * INPUTS + i) * width);
            weight[o][i] = code * (scale * sub_scale) + (k->has_minimum ? minimum * sub_minimum : 0);
        }
    }
    uint8_t *tiles = aligned_alloc(64, (4 * p.tile_bytes + 63) / 64 * 64);
    memset(tiles, 0, 4 * p.tile_bytes);
    p.data = tiles;
    pack_tiles(&p, codes, scales, minima, (uint8_t *)sub_scales, (uint8_t *)sub_minima, OUTPUTS, INPUTS, tiles, 1);
    for (int i = 0; i < MOST_ROWS * INPUTS; i++) x[i] = uniform() - 0.5f;
    for (int is_exact = 0; is_exact < 2; is_exact++) {
        p.multiply = PRODUCTS[is_exact][k->code], p.is_exact = is_exact || k->code >= FRACTIONS;
        for (unsigned n = 0; n < sizeof NUM_ROWS / sizeof *NUM_ROWS; n++) {
            packed_product(x, &p, 1, 0, y, NUM_ROWS[n], INPUTS, OUTPUTS, 0, 1);
            if (!(error_of(x, y, NUM_ROWS[n], weight) <= (p.is_exact ? 3e-6 : 2e-2))) wrong = 1;
        }
    }
    const int64_t ids[3] = {0, OUTPUTS - 1, 17};
    packed_rows(&p, ids, 3, INPUTS, looked_up, 0, 1);
    for (int row = 0; row < 3; row++)
        for (int i = 0; i < INPUTS; i++) {
            double expected = weight[ids[row]][i];
            if (!(fabs(looked_up[row * INPUTS + i] - expected) <= 1e-5 * fabs(expected) + 1e-6)) wrong = 1;
        }
    free(tiles);
    return wrong;
}

int main(void) {
    int wrong = 0;
    for (unsigned i = 0; i < sizeof KINDS / sizeof *KINDS; i++)
        if (is_wrong(KINDS + i)) {
            printf("%s is wrong\n", KINDS[i].name);
            wrong = 1;
        }
    return wrong;
}
