/* Owners, the reclaim list and populate under load, without Python: for the thread and the leak sanitizer.
 *
 * Every owner gets users on several threads that are dropped in any order, while two threads wait and drain. In the
 * end each token was taken exactly once. Prints "ok", or what went wrong and exits with 1.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "owner.h"
#include "pages.h"

enum { OWNERS = 20000, WORKERS = 4, DRAINERS = 2 };

static dlpo_owner *owners[OWNERS];
static atomic_int taken[OWNERS];
static atomic_int total;
static atomic_bool done;

static void check(bool holds, const char *what) {
    if (holds) return;
    fprintf(stderr, "stress: %s\n", what);
    exit(1);
}

/* Each worker has one user of every owner, walks them in an order of its own (`step` is prime to OWNERS), shares some
 * on and drops all. Worker 0 plays the Owner object: it releases and unpins. */
static void *work(void *argument) {
    static const unsigned steps[WORKERS] = {1, 3, 7, 9};
    unsigned self = (unsigned)(uintptr_t)argument, at = self;
    for (unsigned i = 0; i < OWNERS; i++, at = (at + steps[self]) % OWNERS) {
        dlpo_owner *owner = owners[at];
        check(dlpo_owner_users(owner) >= 1, "an owner lost a user");
        if (i % 3 == 0) {
            dlpo_owner_share(owner);
            dlpo_owner_drop(owner);
        }
        if (self == 0) {
            if (i % 2 && dlpo_owner_acquire(owner)) dlpo_owner_drop(owner);
            dlpo_owner_release(owner);
            dlpo_owner_release(owner);
            check(!dlpo_owner_acquire(owner), "a released owner took a user");
            dlpo_owner_drop(owner);
            check(dlpo_owner_token(owner) == at, "a pinned block changed");
            dlpo_owner_unpin(owner);
        } else {
            dlpo_owner_drop(owner);
        }
    }
    return NULL;
}

static void *drain(void *argument) {
    (void)argument;
    while (!atomic_load(&done)) {
        dlpo_reclaim_wait(0.01);
        dlpo_owner *oldest = dlpo_reclaim_take();
        if (oldest && dlpo_owner_token(oldest) % 5 == 0 && atomic_load(&total) < OWNERS / 2) {
            dlpo_reclaim_put_back(oldest);
            continue;
        }
        while (oldest) {
            dlpo_owner *next = dlpo_reclaim_next(oldest);
            atomic_fetch_add(&taken[dlpo_owner_token(oldest)], 1);
            dlpo_owner_unpin(oldest);
            if (atomic_fetch_add(&total, 1) + 1 == OWNERS) {
                atomic_store(&done, true);
                dlpo_reclaim_wake();
            }
            oldest = next;
        }
    }
    return NULL;
}

static void stress_owners(void) {
    for (uint64_t token = 0; token < OWNERS; token++) {
        check((owners[token] = dlpo_owner_new(token)) != NULL, "out of memory");
        for (int i = 0; i < WORKERS; i++) check(dlpo_owner_acquire(owners[token]), "a new owner takes no user");
    }
    pthread_t threads[WORKERS + DRAINERS];
    for (uintptr_t i = 0; i < WORKERS + DRAINERS; i++)
        check(!pthread_create(&threads[i], NULL, i < WORKERS ? work : drain, (void *)i), "no thread");
    for (int i = 0; i < WORKERS + DRAINERS; i++) pthread_join(threads[i], NULL);
    for (int token = 0; token < OWNERS; token++) check(atomic_load(&taken[token]) == 1, "a token was not taken once");
}

static void stress_fork(void) {
    dlpo_owner *waiting = dlpo_owner_new(1), *used = dlpo_owner_new(2);
    check(waiting && used && dlpo_owner_acquire(used), "out of memory");
    dlpo_owner_release(waiting);
    dlpo_owner_release(used);
    pid_t child = fork();
    if (child == 0) {
        dlpo_owner_drop(used);
        _exit(dlpo_fork_generation() == 1 && !dlpo_reclaim_wait(0) && !dlpo_reclaim_take() ? 0 : 1);
    }
    int status = 1;
    check(waitpid(child, &status, 0) == child && status == 0, "the child took something");
    dlpo_owner_drop(used);
    dlpo_owner *first = dlpo_reclaim_take(), *second = first ? dlpo_reclaim_next(first) : NULL;
    check(first == waiting && second == used && !dlpo_reclaim_next(second), "the parent lost something");
    for (int i = 0; i < 2; i++) { /* the list's pin and ours */
        dlpo_owner_unpin(waiting);
        dlpo_owner_unpin(used);
    }
}

static void *hammer(void *argument) {
    (void)argument;
    while (!atomic_load(&done)) dlpo_reclaim_wake();
    return NULL;
}

/* A fork while another thread is inside the lock: the child must find it open. */
static void stress_fork_under_lock(void) {
    pthread_t thread;
    atomic_store(&done, false);
    check(!pthread_create(&thread, NULL, hammer, NULL), "no thread");
    for (int i = 0; i < 300; i++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(10);
            dlpo_reclaim_wake();
            _exit(dlpo_reclaim_wait(0) ? 0 : 1);
        }
        int status = 1;
        check(waitpid(child, &status, 0) == child && status == 0, "a child found the lock held");
    }
    atomic_store(&done, true);
    pthread_join(thread, NULL);
}

static void stress_pages(void) {
    size_t nbytes = ((size_t)70 << 20) + 3;
    void *address;
    check(!dlpo_map_anonymous(nbytes, (size_t)2 << 20, true, &address), "no mapping");
    check(!dlpo_populate(address, nbytes, 3, true), "not populated");
    memset(address, 1, nbytes);
    check(!dlpo_unmap(address, nbytes), "not unmapped");
}

int main(void) {
    check(!dlpo_owner_setup() && !dlpo_owner_setup(), "no setup");
    stress_owners();
    stress_fork();
    stress_fork_under_lock();
    stress_pages();
    puts("ok");
    return 0;
}
