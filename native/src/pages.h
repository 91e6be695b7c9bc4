/* Mappings: plain C. Every function returns 0 or an errno. */
#ifndef DLPO_PAGES_H
#define DLPO_PAGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* `alignment` is a power of two; at least a page is given. */
int dlpo_map_anonymous(size_t nbytes, size_t alignment, bool huge_pages, void **address);
/* From the pool of reserved huge pages of 1 << `page_shift` bytes: whole pages, zero. ENOMEM when the pool is empty. */
int dlpo_map_hugetlb(size_t nbytes, unsigned page_shift, void **address);
/* Shared and read-only; `byte_offset` is a multiple of a page. The descriptor may be closed at once. */
int dlpo_map_file(int descriptor, uint64_t byte_offset, size_t nbytes, void **address);
/* Pages that are not there yet come from this NUMA node, or from another one when it is full (mbind). */
int dlpo_prefer_node(void *address, size_t nbytes, unsigned node);
int dlpo_unmap(void *address, size_t nbytes);
int dlpo_dont_fork(void *address, size_t nbytes);
/* Fault every page in on up to `threads` threads, the calling one among them. Contents stay. Not for writing: ENOSYS
 * where the kernel has no advice for it, EFAULT for what lies behind the end of a file. */
int dlpo_populate(void *address, size_t nbytes, unsigned threads, bool write);

#endif
