/* Owners and the reclaim list.
 *
 * `state` counts users in steps of two; its lowest bit is the owner's own count. One word, so that "released" and
 * "how many users" can never be seen apart, and exactly one thread takes it to zero. That thread pushes the block on
 * the reclaim list. `pins` keeps the block itself: one for whoever called dlpo_owner_new, one for the reclaim list.
 *
 * The list is pushed one block at a time and taken as a whole, so a compare-and-swap push has no ABA problem.
 * Everything is sequentially consistent: a push and a waiter that registers itself must not miss each other.
 */
#include "owner.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

enum { OWN = 1, USER = 2 };

struct dlpo_owner {
    atomic_uint_fast64_t state;
    atomic_uint pins;
    uint64_t token;
    uint64_t generation;
    dlpo_owner *next;
};

static _Atomic(dlpo_owner *) reclaim_head;
static atomic_uint_fast64_t fork_generation;

static pthread_mutex_t wait_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wait_cond;
static atomic_uint waiters;
static uint64_t wakes;     /* under wait_lock */
static bool wake_pending;  /* under wait_lock */

/* ------------------------------------------------------------------------------------------- setup and fork */

static int init_cond(void) {
#ifdef __APPLE__
    return pthread_cond_init(&wait_cond, NULL);
#else
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);
    if (error) return error;
    error = pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    if (!error) error = pthread_cond_init(&wait_cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return error;
#endif
}

/* The child has copies of the parent's blocks but not its memory to free, and none of its other threads: one of
 * them may have held the lock. */
static void after_fork_in_child(void) {
    atomic_fetch_add(&fork_generation, 1);
    atomic_store(&reclaim_head, NULL);
    wait_lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    (void)init_cond(); /* cannot fail where it succeeded before: no resource is taken */
    atomic_store(&waiters, 0);
    wakes = 0;
    wake_pending = false;
}

static int setup_error;

static void setup(void) {
    setup_error = init_cond();
    if (!setup_error) setup_error = pthread_atfork(NULL, NULL, after_fork_in_child);
}

int dlpo_owner_setup(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int error = pthread_once(&once, setup);
    return error ? error : setup_error;
}

uint64_t dlpo_fork_generation(void) { return atomic_load(&fork_generation); }

/* --------------------------------------------------------------------------------------------- reclaim list */

static void wake_waiters(void) {
    if (atomic_load(&waiters) == 0) return;
    pthread_mutex_lock(&wait_lock);
    pthread_cond_broadcast(&wait_cond);
    pthread_mutex_unlock(&wait_lock);
}

static void push(dlpo_owner *owner) {
    dlpo_owner *head = atomic_load(&reclaim_head);
    do {
        owner->next = head;
    } while (!atomic_compare_exchange_weak(&reclaim_head, &head, owner));
}

dlpo_owner *dlpo_reclaim_take(void) {
    dlpo_owner *newest = atomic_exchange(&reclaim_head, NULL);
    dlpo_owner *oldest = NULL;
    while (newest) {
        dlpo_owner *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    return oldest;
}

dlpo_owner *dlpo_reclaim_next(const dlpo_owner *owner) { return owner->next; }

void dlpo_reclaim_put_back(dlpo_owner *oldest) {
    while (oldest) {
        dlpo_owner *next = oldest->next;
        push(oldest);
        oldest = next;
    }
    wake_waiters();
}

/* False when the deadline passed. `left` is what remains of it, in seconds. */
static bool wait_until(const struct timespec *deadline) {
#ifdef __APPLE__
    struct timespec now, left;
    clock_gettime(CLOCK_MONOTONIC, &now);
    left.tv_sec = deadline->tv_sec - now.tv_sec;
    left.tv_nsec = deadline->tv_nsec - now.tv_nsec;
    if (left.tv_nsec < 0) {
        left.tv_sec -= 1;
        left.tv_nsec += 1000000000L;
    }
    if (left.tv_sec < 0) return false;
    return pthread_cond_timedwait_relative_np(&wait_cond, &wait_lock, &left) != ETIMEDOUT;
#else
    return pthread_cond_timedwait(&wait_cond, &wait_lock, deadline) != ETIMEDOUT;
#endif
}

bool dlpo_reclaim_wait(double timeout_s) {
    struct timespec deadline;
    clock_gettime(CLOCK_MONOTONIC, &deadline);
    double whole = floor(timeout_s);
    deadline.tv_sec += (time_t)whole;
    deadline.tv_nsec += (long)((timeout_s - whole) * 1e9);
    if (deadline.tv_nsec >= 1000000000L) {
        deadline.tv_sec += 1;
        deadline.tv_nsec -= 1000000000L;
    }

    pthread_mutex_lock(&wait_lock);
    atomic_fetch_add(&waiters, 1); /* before the list is looked at: see push and wake_waiters */
    uint64_t seen = wakes;
    bool in_time = true, found;
    while (!(found = wake_pending || wakes != seen || atomic_load(&reclaim_head) != NULL) && in_time)
        in_time = wait_until(&deadline);
    if (found) wake_pending = false;
    atomic_fetch_sub(&waiters, 1);
    pthread_mutex_unlock(&wait_lock);
    return found;
}

void dlpo_reclaim_wake(void) {
    pthread_mutex_lock(&wait_lock);
    wakes += 1;
    wake_pending = true; /* so that a wake just before a wait is not lost */
    pthread_cond_broadcast(&wait_cond);
    pthread_mutex_unlock(&wait_lock);
}

/* --------------------------------------------------------------------------------------------------- owners */

dlpo_owner *dlpo_owner_new(uint64_t token) {
    dlpo_owner *owner = malloc(sizeof *owner);
    if (!owner) return NULL;
    atomic_init(&owner->state, OWN);
    atomic_init(&owner->pins, 2);
    owner->token = token;
    owner->generation = dlpo_fork_generation();
    owner->next = NULL;
    return owner;
}

static void unused(dlpo_owner *owner) {
    if (owner->generation == dlpo_fork_generation()) {
        push(owner);
        wake_waiters();
    } else {
        dlpo_owner_unpin(owner); /* a copy in a forked child: the parent has the memory and its list */
    }
}

bool dlpo_owner_acquire(dlpo_owner *owner) {
    uint_fast64_t state = atomic_load(&owner->state);
    do {
        if (!(state & OWN)) return false;
    } while (!atomic_compare_exchange_weak(&owner->state, &state, state + USER));
    return true;
}

void dlpo_owner_share(dlpo_owner *owner) { atomic_fetch_add(&owner->state, USER); }

void dlpo_owner_drop(dlpo_owner *owner) {
    if (atomic_fetch_sub(&owner->state, USER) == USER) unused(owner);
}

void dlpo_owner_release(dlpo_owner *owner) {
    if (atomic_fetch_and(&owner->state, ~(uint_fast64_t)OWN) == OWN) unused(owner);
}

void dlpo_owner_unpin(dlpo_owner *owner) {
    if (atomic_fetch_sub(&owner->pins, 1) == 1) free(owner);
}

uint64_t dlpo_owner_token(const dlpo_owner *owner) { return owner->token; }

uint64_t dlpo_owner_users(const dlpo_owner *owner) { return atomic_load(&owner->state) / USER; }
