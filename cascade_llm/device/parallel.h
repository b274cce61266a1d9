/* Loops that several threads share; every C file of this package spreads its work by this one call. */
#ifndef CASCADE_PARALLEL_H
#define CASCADE_PARALLEL_H

/* In parallel.c: the one pool of this process. */
void cascade_parallel_for(void (*part)(void *task, long index), void *task, long count, int threads);

/* part(task, index) for every index from 0 to count - 1, on at most `threads` threads, the caller's among them; returns
 * when all are done. Threads take the indices in ascending order, the next one each time they are free, so that a
 * delayed thread is helped. A call inside a part, or beside another thread's call, runs on its own thread alone. */
static inline void parallel_for(void (*part)(void *task, long index), void *task, long count, int threads) {
    if (threads > 1 && count > 1) {
        cascade_parallel_for(part, task, count, threads);
        return;
    }
    for (long index = 0; index < count; index++) part(task, index);
}

/* Where part `index` of `count` even parts of a range of `size` begins; it ends where the next one begins. */
static inline long part_begin(long size, long index, long count) { return size * index / count; }

#endif
