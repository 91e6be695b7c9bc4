/* Owners and the reclaim list: plain C, no Python, no CUDA. Every function may be called on any thread. */
#ifndef DLPO_OWNER_H
#define DLPO_OWNER_H

#include <stdbool.h>
#include <stdint.h>

typedef struct dlpo_owner dlpo_owner;

/* Install the fork handler and the wait's clock; once a process, safe to repeat. Returns 0 or an errno. */
int dlpo_owner_setup(void);

/* A new owner with its own count, and one pin for the caller; NULL when memory is short. */
dlpo_owner *dlpo_owner_new(uint64_t token);

/* Count one more user, on behalf of the owner; false when the owner gave its own count up. */
bool dlpo_owner_acquire(dlpo_owner *owner);
/* Count one more user, on behalf of somebody who is counted already. */
void dlpo_owner_share(dlpo_owner *owner);
/* Count one user less. */
void dlpo_owner_drop(dlpo_owner *owner);
/* Give the owner's own count up; later calls do nothing. */
void dlpo_owner_release(dlpo_owner *owner);
/* Give the caller's pin up: the control block may be gone afterwards. */
void dlpo_owner_unpin(dlpo_owner *owner);

uint64_t dlpo_owner_token(const dlpo_owner *owner);
uint64_t dlpo_owner_users(const dlpo_owner *owner);

/* Take the whole reclaim list, oldest first, and walk it. Each block is then either unpinned or put back. */
dlpo_owner *dlpo_reclaim_take(void);
dlpo_owner *dlpo_reclaim_next(const dlpo_owner *owner);
void dlpo_reclaim_put_back(dlpo_owner *oldest);

/* Wait until the list is not empty or dlpo_reclaim_wake is called; false when the time ran out. */
bool dlpo_reclaim_wait(double timeout_s);
/* End the waits that are under way, or the next one when there is none. */
void dlpo_reclaim_wake(void);

uint64_t dlpo_fork_generation(void);

#endif
