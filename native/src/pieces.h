/* A range of memory, shared out to several threads piece by piece: plain C. */
#ifndef DLPO_PIECES_H
#define DLPO_PIECES_H

#include <stddef.h>

/* Works on `length` bytes from `at` on; 0 or an errno. */
typedef int (*dlpo_piece)(const void *context, size_t at, size_t length);

/* Every piece of `nbytes`, of `piece` bytes but the last, on up to `threads` threads, the calling one among them. After
 * an error nothing new is begun, and the first one is returned. A thread that cannot be started is done without. */
int dlpo_in_pieces(size_t nbytes, size_t piece, unsigned threads, dlpo_piece work, const void *context);

#endif
