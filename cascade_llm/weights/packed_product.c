/* y = x Wᵀ + b with W kept in few bits; see packed.py, which builds the matrices and calls this.
 *
 * Here rows are prepared and spread over threads; packed.h says how a matrix lies, packed_tiles.c multiplies its tiles.
 */
#include <math.h>
#include <stdlib.h>

#include "packed.h"
#include "parallel.h"

/* ---- across the lanes of one vector ---- */

#if defined(AVX512)
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
#elif defined(__aarch64__)
INLINE int32_t sum_of(ints x) { return vaddvq_s32((int32x4_t)x); }
INLINE uint32_t largest_of(words x) { return vmaxvq_u32((uint32x4_t)x); }
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

/* ---- activations ---- */

enum { PER_BLOCK = BLOCK / LANES };

/* 32 integers of -127 to 127, of row r in a group's codes, and their scale; a block with NaN or infinity gets the scale
 * NaN. `sums` are the two halves'. Adding 1.5 * 2**23 rounds to the nearest integer, which then are the lowest bits. */
INLINE float quantize_block(const floats *x, int8_t *codes, long rows, long r, int32_t *sums) {
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
        *(small *)(codes + place_of_code(rows, r, LANES * v)) = __builtin_convertvector(rounded, small);
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
            float scale = quantize_block(block, (int8_t *)record, rows, r, sums);
            numbers[r] = scale;
            ((int32_t *)numbers)[rows + r] = sums[0] + sums[1];
            numbers[2 * rows + r] = scale * (float)(sums[0] + sums[1]);
            for (int half = 0; half < 2 && t->has_halves; half++) {
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
    PREPARE_FROM = 4096    /* values of rows: what another core wrote comes slowly, so all that multiply prepare */
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
                p->multiply(t, p, 2 * (pair - before), s->first_group, s->last_group);
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
    int quantizes, widens, has_halves;
} forms;

static forms forms_of(const piece *pieces, long num_pieces) {
    forms f = {0};
    for (long i = 0; i < num_pieces; i++) {
        if (pieces[i].is_exact) f.widens = 1;
        else f.quantizes = 1;
        f.has_halves |= is_halved(pieces[i].code);
    }
    return f;
}

/* Memory for the groups of `rows` rows, which `t` is told of; null where there is none. */
static uint8_t *group_memory(product *t, forms f, long rows) {
    long blocks = t->in_size / BLOCK;
    size_t size = rows * blocks * (f.quantizes * INTEGER_BYTES + f.widens * FLOAT_BYTES);
    uint8_t *memory = aligned_alloc(64, (size + 63) / 64 * 64);
    t->has_halves = f.has_halves;
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
                   long in_size, long y_stride, int is_bfloat16, int threads) {
    product t = {pieces, num_pieces, rows, in_size, y_stride, 0, 0, x, 0, bias, y, is_bfloat16};
    forms f = forms_of(pieces, num_pieces);
    uint8_t *memory = group_memory(&t, f, rows);
    if (!memory) return 1;
    long groups = num_groups(rows), at_once = groups_at_once(&t, f);
    parallel_for(prepare, &t, groups, rows * in_size >= PREPARE_FROM ? threads : 1);
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
                         int is_bfloat16, int threads) {
    long rows = ends[matrices - 1];
    product whole = {pieces, 0, rows, in_size, y_stride, 0, 0, x, sources, bias, y, is_bfloat16};
    forms f = forms_of(pieces, pieces_each * matrices);
    long most_rows = groups_at_once(&whole, f) * ROWS;
    uint8_t *memory = group_memory(&whole, f, rows);
    product *products = malloc((matrices + rows / most_rows) * sizeof *products);
    if (memory && products) {
        long count = stack_products(&whole, pieces_each, ends, matrices, most_rows, products);
        parallel_for(prepare_product, products, count, rows * in_size >= PREPARE_FROM ? threads : 1);
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
