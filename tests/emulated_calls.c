/* Calls functions of libraries for this architecture, in an emulator, for a process of another: see emulated_level.py.
 *
 * A call comes from standard input as a `request`, and its result goes to standard output. A name that is a path asks for
 * that library to be loaded, one behind & for the function's address here. Pointers are addresses of
 * the caller, whose memory is the open file `memory`: a page comes when it is first touched, at the same address, and what
 * a call has changed goes back when it returns.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, MOST_PAGES = 1 << 16, INTEGERS = 16, FLOATS = 4, MOST_TOUCHES = 1000 };
/* How this program ends where it cannot go on. */
enum { NOT_LOADED = 3, TAKEN, NO_MEMORY, TOO_MANY, FORBIDDEN };

typedef struct {
    char name[256];
    int64_t integers[INTEGERS]; /* arguments that are no floats, in order; functions take the first of them */
    float floats[FLOATS];
} request;

typedef int64_t function(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float, float, float);

static int memory, copies; /* copies: a file of the pages as they came */
static uint8_t *pages[MOST_PAGES]; /* here and at the caller */
static const uint8_t (*pristine)[PAGE]; /* the copies */
static volatile long num_pages;
static volatile int is_busy, touches; /* touches: of pages that other threads have brought, one after the other */

static int is_here(const uint8_t *page) {
    for (long i = num_pages - 1; i >= 0; i--)
        if (pages[i] == page) return 1;
    return 0;
}

static void bring(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)context;
    uint8_t *page = (uint8_t *)((uintptr_t)info->si_addr / PAGE * PAGE);
    while (__sync_lock_test_and_set(&is_busy, 1)) continue;
    if (is_here(page)) {
        if (++touches == MOST_TOUCHES) _exit(FORBIDDEN);
    } else {
        touches = 0;
        if (num_pages == MOST_PAGES) _exit(TOO_MANY);
        uint8_t content[PAGE];
        if (pread(memory, content, PAGE, (off_t)(uintptr_t)page) != PAGE) _exit(NO_MEMORY);
        if (pwrite(copies, content, PAGE, num_pages * PAGE) != PAGE) _exit(NO_MEMORY);
        /* the emulator maps in steps, and another thread must not see what is between them */
        if (mmap(page, PAGE, PROT_NONE, MAP_PRIVATE, copies, num_pages * PAGE) != page) _exit(TAKEN);
        if (mprotect(page, PAGE, PROT_READ | PROT_WRITE)) _exit(NO_MEMORY);
        pages[num_pages++] = page;
    }
    __sync_lock_release(&is_busy);
}

/* In place of the system's, which the libraries' threads ask to block all signals: this one is how pages come. */
int pthread_sigmask(int how, const sigset_t *set, sigset_t *before) {
    sigset_t kept = *set;
    sigdelset(&kept, SIGSEGV);
    return sigprocmask(how, &kept, before);
}

/* Other bytes of a page may have become others meanwhile. */
static void give_back(const uint8_t *page, const uint8_t *before) {
    for (long begin = 0, end; begin < PAGE; begin = end) {
        end = begin + 1;
        if (page[begin] == before[begin]) continue;
        while (end < PAGE && page[end] != before[end]) end++;
        if (pwrite(memory, page + begin, end - begin, (off_t)(uintptr_t)(page + begin)) != end - begin) _exit(NO_MEMORY);
    }
}

static int read_request(request *r) {
    for (size_t done = 0; done < sizeof *r;) {
        ssize_t got = read(0, (char *)r + done, sizeof *r - done);
        if (got <= 0) return 0;
        done += (size_t)got;
    }
    return 1;
}

int main(int count, char **arguments) {
    if (count != 2) return 1;
    memory = atoi(arguments[1]);
    copies = memfd_create("copies", 0);
    if (ftruncate(copies, (off_t)MOST_PAGES * PAGE)) return 1;
    pristine = mmap(0, (size_t)MOST_PAGES * PAGE, PROT_READ, MAP_SHARED, copies, 0);
    struct sigaction action = {.sa_sigaction = bring, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, 0);
    for (request r; read_request(&r);) {
        const int64_t *n = r.integers;
        int64_t result = 0;
        if (*r.name == '/') {
            if (!dlopen(r.name, RTLD_NOW | RTLD_GLOBAL)) return fprintf(stderr, "%s\n", dlerror()), NOT_LOADED;
        } else {
            int asks_address = *r.name == '&';
            function *f = (function *)dlsym(RTLD_DEFAULT, r.name + asks_address);
            if (!f) return NOT_LOADED;
            if (asks_address) result = (int64_t)(intptr_t)f;
            else result = f(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13],
                            n[14], n[15], r.floats[0], r.floats[1], r.floats[2], r.floats[3]);
        }
        for (long i = 0; i < num_pages; i++) {
            give_back(pages[i], pristine[i]);
            munmap(pages[i], PAGE);
        }
        num_pages = 0;
        if (write(1, &result, sizeof result) != sizeof result) return 1;
    }
    return 0;
}
