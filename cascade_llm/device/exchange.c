/* How ranks wait for each other in memory that they share; see memory_exchange.py.
 *
 * Each rank has a line that it alone writes: twice the number of exchanges that it has begun, and 1 once it has left.
 * A rank that waits sleeps at once: where there are fewer cores than ranks, spinning would keep the others from theirs.
 */
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#ifdef __linux__
#include <limits.h>
#include <sys/syscall.h>
#include <unistd.h>
enum { FUTEX_WAIT, FUTEX_WAKE }; /* as in linux/futex.h, which is not everywhere */
static void sleep_while(_Atomic uint32_t *word, uint32_t value) { syscall(SYS_futex, word, FUTEX_WAIT, value, 0, 0, 0); }
static void wake_all(_Atomic uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, 0, 0, 0); }
#else
static void sleep_while(_Atomic uint32_t *word, uint32_t value) {
    if (*word == value) nanosleep(&(struct timespec){.tv_nsec = 20000}, 0);
}
static void wake_all(_Atomic uint32_t *word) { (void)word; }
#endif

typedef struct {
    _Alignas(64) _Atomic uint32_t begun;
    _Atomic uint32_t sleepers;
} Line;

/* What this rank wrote before is seen by whoever sees `begun`. Who sleeps says so before it looks a last time. */
void rank_tell(Line *own, uint32_t begun) {
    own->begun = begun;
    if (own->sleepers) wake_all(&own->begun);
}

/* Until `count` ranks have begun so much; returns 0, or 1 where one has left before. */
int rank_wait(Line *lines, long count, uint32_t begun) {
    for (Line *line = lines; line < lines + count; line++) {
        uint32_t seen;
        if ((int32_t)((seen = line->begun) - begun) >= 0) continue;
        line->sleepers++;
        while ((int32_t)((seen = line->begun) - begun) < 0 && !(seen & 1)) sleep_while(&line->begun, seen);
        line->sleepers--;
        if ((int32_t)(seen - begun) < 0) return 1;
    }
    return 0;
}
