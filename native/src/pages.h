/* Anonymous mappings: plain C. Every function returns 0 or an errno. */
#ifndef DLPO_PAGES_H
#define DLPO_PAGES_H

#include <stdbool.h>
#include <stddef.h>

/* `alignment` is a power of two; at least a page is given. */
int dlpo_map_anonymous(size_t nbytes, size_t alignment, bool huge_pages, void **address);
int dlpo_unmap(void *address, size_t nbytes);
int dlpo_dont_fork(void *address, size_t nbytes);
/* Fault every page in for writing on up to `threads` threads, the calling one among them. Contents stay. */
int dlpo_populate(void *address, size_t nbytes, unsigned threads);

#endif
