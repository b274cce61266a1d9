/* The threads behind parallel.h: one pool in a process, started when first asked.
 *
 * A thread without work spins for some microseconds and then sleeps: in a decode step the next loop comes before the
 * spinning ends, and a pause costs no processor time. Nobody waits for a thread that has not begun: the caller takes
 * whatever indices are left, closes the loop, and waits for those alone who are inside a part. So a worker that the
 * system gave another process's time costs its share and no more.
 */
#include "parallel.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

enum { MOST_WORKERS = 1023, STACK_BYTES = 8 << 20, PAUSES_PER_LOOK = 32 };
#ifndef SPIN_NS
#define SPIN_NS 200000
#endif

/* The gate of a loop: its number, whether it is closed, how many workers may still come in, how many are inside. */
static const uint64_t ONE_INSIDE = 1, INSIDE = 0xffff, ONE_MORE = 1 << 16, MORE = 0x7fff0000, CLOSED = 1u << 31;
static uint64_t number_of(uint64_t gate) { return gate >> 32; }

static struct {
    pthread_mutex_t calling; /* held by the thread whose loop it is */
    int workers, most;
    void (*part)(void *task, long index);
    void *task;
    long count;
    pthread_mutex_t lock; /* of those that sleep */
    pthread_cond_t opened, left;
    _Atomic int asleep, caller_asleep;
    _Alignas(64) _Atomic uint64_t gate;
    _Alignas(64) _Atomic long next;
} pool = {.calling = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .opened = PTHREAD_COND_INITIALIZER,
          .left = PTHREAD_COND_INITIALIZER,
          .most = MOST_WORKERS,
          .gate = 1u << 31};

static void pause_a_little(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int loop_is_new(uint64_t seen) { return number_of(pool.gate) != seen; }
static int nobody_inside(uint64_t unused) { return (void)unused, !(pool.gate & INSIDE); }

/* Look again and again for a while; returns whether it came true. */
static int spin_until(int (*is_true)(uint64_t), uint64_t argument) {
    for (int64_t end_ns = now_ns() + SPIN_NS;;) {
        for (int i = 0; i < PAUSES_PER_LOOK; i++) {
            if (is_true(argument)) return 1;
            pause_a_little();
        }
        if (now_ns() >= end_ns) return 0;
    }
}

/* Who sleeps says so before it looks a last time, and who changes the gate looks for sleepers afterwards. */
static void sleep_until(int (*is_true)(uint64_t), uint64_t argument, _Atomic int *sleepers, pthread_cond_t *called) {
    pthread_mutex_lock(&pool.lock);
    ++*sleepers;
    while (!is_true(argument)) pthread_cond_wait(called, &pool.lock);
    --*sleepers;
    pthread_mutex_unlock(&pool.lock);
}

static void wake(_Atomic int *sleepers, pthread_cond_t *call) {
    if (!*sleepers) return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(call);
    pthread_mutex_unlock(&pool.lock);
}

static void take_parts(void) {
    for (long index; (index = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.count;)
        pool.part(pool.task, index);
}

static void *work(void *number) {
    for (uint64_t seen = (uintptr_t)number;;) {
        if (!spin_until(loop_is_new, seen)) sleep_until(loop_is_new, seen, &pool.asleep, &pool.opened);
        uint64_t gate = pool.gate;
        int came_in = 0;
        while (!came_in && !(gate & CLOSED) && gate & MORE)
            came_in = atomic_compare_exchange_weak(&pool.gate, &gate, gate - ONE_MORE + ONE_INSIDE);
        seen = number_of(gate);
        if (!came_in) continue;
        take_parts();
        gate = atomic_fetch_sub(&pool.gate, ONE_INSIDE);
        if ((gate & INSIDE) == 1 && gate & CLOSED) wake(&pool.caller_asleep, &pool.left);
    }
    return NULL;
}

/* A child has one thread: it begins anew. */
static void forget_workers(void) {
    pthread_mutex_init(&pool.calling, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.opened, NULL);
    pthread_cond_init(&pool.left, NULL);
    pool.workers = 0;
    pool.asleep = 0, pool.caller_asleep = 0;
    pool.gate = CLOSED;
}

/* At least so many workers, where the system gives them. Signals stay with the process's own threads. */
static void start_workers(int wanted) {
    static int prepared;
    if (!prepared) prepared = !pthread_atfork(NULL, NULL, forget_workers);
    sigset_t all, before;
    pthread_attr_t attributes;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    while (pool.workers < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, work, (void *)(uintptr_t)number_of(pool.gate))) {
            pool.most = pool.workers; /* not asked again */
            break;
        }
        pool.workers++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void cascade_parallel_for(void (*part)(void *task, long index), void *task, long count, int threads) {
    if (pthread_mutex_trylock(&pool.calling)) {
        for (long index = 0; index < count; index++) part(task, index);
        return;
    }
    int helpers = (int)(count < threads ? count : threads) - 1;
    if (helpers > pool.most) helpers = pool.most;
    if (pool.workers < helpers) start_workers(helpers);
    if (helpers > pool.workers) helpers = pool.workers;
    pool.part = part, pool.task = task, pool.count = count, pool.next = 0;
    pool.gate = (number_of(pool.gate) + 1) << 32 | (uint64_t)helpers << 16;
    wake(&pool.asleep, &pool.opened);
    take_parts();
    if (atomic_fetch_or(&pool.gate, CLOSED) & INSIDE && !spin_until(nobody_inside, 0))
        sleep_until(nobody_inside, 0, &pool.caller_asleep, &pool.left);
    pthread_mutex_unlock(&pool.calling);
}
