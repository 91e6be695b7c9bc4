/* Threads that take pieces of a range until there is none left. */
#include "pieces.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

enum { MAX_THREADS = 256 };

typedef struct {
    dlpo_piece work;
    const void *context;
    size_t nbytes, piece;
    atomic_size_t next;
    atomic_int error;
} range;

static void *take_pieces(void *argument) {
    range *shared = argument;
    while (atomic_load(&shared->error) == 0) {
        size_t at = atomic_fetch_add(&shared->next, shared->piece);
        if (at >= shared->nbytes) break;
        size_t left = shared->nbytes - at;
        int error = shared->work(shared->context, at, left < shared->piece ? left : shared->piece);
        int none = 0;
        if (error) atomic_compare_exchange_strong(&shared->error, &none, error);
    }
    return NULL;
}

int dlpo_in_pieces(size_t nbytes, size_t piece, unsigned threads, dlpo_piece work, const void *context) {
    if (nbytes == 0) return 0;
    range shared = {.work = work, .context = context, .nbytes = nbytes, .piece = piece};
    atomic_init(&shared.next, 0);
    atomic_init(&shared.error, 0);

    size_t pieces = (nbytes - 1) / piece + 1;
    if (threads > pieces) threads = (unsigned)pieces;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    pthread_t others[MAX_THREADS];
    unsigned started = 0;
    if (threads > 1) {
        /* Signals belong to the program's own threads. */
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (started + 1 < threads && !pthread_create(&others[started], NULL, take_pieces, &shared)) started++;
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    take_pieces(&shared);
    while (started) pthread_join(others[--started], NULL);
    return atomic_load(&shared.error);
}
