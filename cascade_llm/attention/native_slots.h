/* One layer's pool, and what is written into it. */
#ifndef CASCADE_NATIVE_SLOTS_H
#define CASCADE_NATIVE_SLOTS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_pages.h"

/* One layer's pool. */
typedef struct {
    stored *k, *v;               /* [slots, num_kv_heads, HEAD_DIM] */
    float *k_scales, *v_scales;  /* [slots, num_kv_heads]; int8 pages only */
    float k_scale, v_scale;      /* of all that is stored; other than 1 for e4m3 pages only */
} pages;

/* Where the scales of a key's vector stand. */
INLINE int64_t scale_index(const pages *from, const stored *key) { return (key - from->k) / HEAD_DIM; }

/* The HEAD_DIM numbers of one token and head into a page. `scale`: the layer's, for e4m3; `own_scale`: int8's. */
INLINE void store_vector(stored *out, float *own_scale, const element *x, float scale) {
#ifdef PAGES_INT8
    uint32_t most = 0; /* as bits, infinity and NaN are larger than all numbers */
    for (long d = 0; d < HEAD_DIM; d++) {
        const uint32_t bits = bits_of(load(x[d])) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const float own = most < 0x7f800000 ? float_of(most) / 127.0f : NAN;
    for (long d = 0; d < HEAD_DIM; d++) {
        const float y = own > 0 ? rintf(load(x[d]) / own) : 0.0f;
        out[d] = (stored)(y > 127.0f ? 127.0f : y < -127.0f ? -127.0f : y);
    }
    *own_scale = own;
    (void)scale;
#elif defined(PAGES_FLOAT8)
    for (long d = 0; d < HEAD_DIM; d++) out[d] = narrow(load(x[d]) / scale);
    (void)own_scale;
#else
    long done = 0;
#if defined(PAGES_FLOAT16) && defined(FLOAT32) && defined(__F16C__)
    for (; done + 8 <= HEAD_DIM; done += 8) {
        const __m256 numbers = _mm256_loadu_ps(x + done), magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), numbers);
        const __m256 beyond = _mm256_cmp_ps(magnitude, _mm256_set1_ps(LAST_NUMBER), _CMP_GT_OQ); /* all ones: a NaN */
        const __m128i halves = _mm256_cvtps_ph(_mm256_or_ps(numbers, beyond), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i *)(out + done), halves);
    }
#endif
    for (long d = done; d < HEAD_DIM; d++) out[d] = narrow(load(x[d]));
    (void)own_scale, (void)scale;
#endif
}

/* Store k and v, [rows, num_kv_heads, HEAD_DIM] with strides from row to row, at their slots. */
void write_slots(const pages *to, const element *k, const element *v, int64_t k_stride, int64_t v_stride,
                 const int64_t *slots, int64_t num_rows, int64_t num_kv_heads) {
    for (int64_t row = 0; row < num_rows; row++) {
        const element *k_row = k + row * k_stride, *v_row = v + row * v_stride;
        const int64_t at = slots[row] * num_kv_heads; /* in vectors */
#ifdef SAME_TYPE
        memcpy(to->k + at * HEAD_DIM, k_row, (size_t)num_kv_heads * HEAD_DIM * sizeof *k);
        memcpy(to->v + at * HEAD_DIM, v_row, (size_t)num_kv_heads * HEAD_DIM * sizeof *v);
#else
        for (int64_t head = 0; head < num_kv_heads; head++) {
            const int64_t to_head = (at + head) * HEAD_DIM, from_head = head * HEAD_DIM;
            store_vector(to->k + to_head, to->k_scales + at + head, k_row + from_head, to->k_scale);
            store_vector(to->v + to_head, to->v_scales + at + head, v_row + from_head, to->v_scale);
        }
#endif
    }
}

#endif
