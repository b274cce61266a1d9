/* Calls of compiled functions, made again in order.
 *
 * A call is made with more arguments than its function takes. Both calling conventions that this is used with (System V
 * for AMD64 and AAPCS64, on Linux; Apple's packs what lies on the stack) pass integers and floats in two sequences, each in order, and the caller takes what lies
 * on the stack away again, so that a function finds its own arguments and does not see the others. */
enum { MOST_INTEGERS = 16, MOST_FLOATS = 4 };

typedef struct {
    void *function;
    long returns; /* whether it returns an int, 0 where all went well */
    long integers[MOST_INTEGERS]; /* and addresses */
    float floats[MOST_FLOATS];
} call;

typedef int (*any)(long, long, long, long, long, long, long, long, long, long, long, long, long, long, long, long, float,
                   float, float, float);

/* Returns 0, or what the first function that failed returned; those after it are not called. */
int replay_calls(const call *calls, long count) {
    for (const call *now = calls; now < calls + count; now++) {
        const long *i = now->integers;
        const float *x = now->floats;
        const int returned =
            ((any)now->function)(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13],
                                 i[14], i[15], x[0], x[1], x[2], x[3]);
        if (now->returns && returned) return returned;
    }
    return 0;
}
