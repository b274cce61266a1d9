/* A tile of keys and values, packed into the order that products want. */
#ifndef CASCADE_NATIVE_PACKING_H
#define CASCADE_NATIVE_PACKING_H

#include <string.h>

#include "native_amx.h"
#include "native_pages.h"
#include "native_slots.h"

enum {
    TILE = HAS_AMX ? 64 : 128, /* keys that are packed at a time; where products are fast, they and scores fit 48 KB */
    KEY_WORDS = HEAD_DIM / ELEMENTS_PER_WORD,
    /* Words and keys of a product fill tile registers, where there are any; zeros stand behind the last. */
    KEY_WIDTH = HAS_AMX ? (KEY_WORDS + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS : KEY_WORDS,
    KEYS_AT_ONCE = HAS_AMX ? 2 * AMX_ROWS : ELEMENTS_PER_WORD,
    VALUE_WIDTH = (HEAD_DIM + LANES - 1) / LANES * LANES
};

/* Keys as [word][key], values as [pair of keys, or key][dimension]. */
typedef struct {
    float keys[KEY_WIDTH * TILE] __attribute__((aligned(64)));
    float values[TILE / ELEMENTS_PER_WORD * VALUE_WIDTH] __attribute__((aligned(64)));
#ifdef PAGES_INT8
    float key_scales[TILE], value_scales[TILE];
#endif
} packed_tile;

/* LANES keys, LANES words: out[word * TILE + key]. */
#ifdef AVX512
INLINE void transpose_words(const stored *const *keys, long first_word, float *out) {
    __m512i r[16], t[16];
    const long left = KEY_WIDTH - first_word;
    UNROLLED for (int i = 0; i < 8; i++) {
        r[i] = (__m512i)words_at(keys[i], first_word * ELEMENTS_PER_WORD);
        r[i + 8] = (__m512i)words_at(keys[i + 8], first_word * ELEMENTS_PER_WORD);
    }
    UNROLLED for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLLED for (int i = 0; i < 8; i++) {
        /* t[i] holds words i and 8 + i of keys 0-7, t[i + 8] of keys 8-15 */
        if (i < left) _mm512_store_ps(out + i * TILE, (__m512)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        if (i + 8 < left) _mm512_store_ps(out + (i + 8) * TILE, (__m512)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}

#else
#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
INLINE void transpose_words(const stored *const *keys, long first_word, float *out) {
    vector r[8], t[8];
    const long left = KEY_WIDTH - first_word;
    UNROLLED for (int i = 0; i < 8; i++) r[i] = words_at(keys[i], first_word);
    UNROLLED for (int i = 0; i < 4; i++) {
        t[2 * i] = SHUFFLED(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[2 * i + 1] = SHUFFLED(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    UNROLLED for (int i = 0; i < 2; i++) {
        /* r[4 i + n] holds words n and 4 + n of keys 4 i to 4 i + 3 */
        r[4 * i] = SHUFFLED(t[4 * i], t[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 1] = SHUFFLED(t[4 * i], t[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[4 * i + 2] = SHUFFLED(t[4 * i + 1], t[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 3] = SHUFFLED(t[4 * i + 1], t[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    UNROLLED for (int i = 0; i < 4; i++) {
        if (i < left) put_vector(out + i * TILE, SHUFFLED(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        if (i + 4 < left) put_vector(out + (i + 4) * TILE, SHUFFLED(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
}
#endif

static void pack_keys(const stored *const *keys, long num_keys, float *out) {
    for (long key = 0; key < num_keys; key += LANES) /* past the end stand repeats of the last key */
        UNROLLED for (long word = 0; word < KEY_WORDS; word += LANES)
            transpose_words(keys + key, word, out + word * TILE + key);
}

#ifdef PAIRS
static void pack_values(const stored *const *keys, int64_t values, long num_keys, float *out) {
    uint16_t order[2][32];
    for (int i = 0; i < 32; i++)
        for (int half = 0; half < 2; half++) order[half][i] = (uint16_t)(16 * half + i / 2 + (i & 1 ? 32 : 0));
    const __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    for (long key = 0; key < num_keys; key += 2, out += VALUE_WIDTH) {
        const int is_pair = key + 1 < num_keys;
        UNROLLED for (long d = 0; d < HEAD_DIM; d += 32) {
            __m512i a = (__m512i)words_at(keys[key] + values, d);
            __m512i b = _mm512_maskz_mov_epi16(is_pair ? 0xffffffff : 0, (__m512i)words_at(keys[key + 1] + values, d));
            _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
            if (d + 16 < VALUE_WIDTH) _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
    for (long key = (num_keys + 1) & ~1; key % KEYS_AT_ONCE; key += 2, out += VALUE_WIDTH)
        memset(out, 0, VALUE_WIDTH * sizeof *out);
}
#else
static void pack_values(const stored *const *keys, int64_t values, long num_keys, float *out) {
    for (long key = 0; key < num_keys; key++, out += VALUE_WIDTH)
        UNROLLED for (long d = 0; d < VALUE_WIDTH; d += LANES) put_vector(out + d, words_at(keys[key] + values, d));
}
#endif

static void pack_tile(const pages *from, const stored *const *keys, long num_keys, packed_tile *out) {
    pack_keys(keys, num_keys, out->keys);
    pack_values(keys, from->v - from->k, num_keys, out->values);
#ifdef PAGES_INT8
    for (long key = 0; key < num_keys; key++) {
        out->key_scales[key] = from->k_scales[scale_index(from, keys[key])];
        out->value_scales[key] = from->v_scales[scale_index(from, keys[key])];
    }
    for (long key = num_keys; key < TILE; key++) out->key_scales[key] = out->value_scales[key] = 0;
#endif
}

#endif
