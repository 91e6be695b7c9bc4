/* Mappings of anonymous memory, aligned and advised, and of files; populated by several threads. */
#include "pages.h"
#include "pieces.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif
#include <unistd.h>

#if defined(__linux__) && !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; older C libraries do not name it */
#endif
#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22
#endif

/* Whole huge pages, small enough that threads end together and stop soon after an error. */
static const size_t PIECE = (size_t)32 << 20;

static size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

static int advise_huge_pages(void *address, size_t nbytes) {
#ifdef MADV_HUGEPAGE
    /* EINVAL is what a kernel without transparent huge pages says. */
    if (madvise(address, nbytes, MADV_HUGEPAGE) && errno != EINVAL) return errno;
#else
    (void)address, (void)nbytes;
#endif
    return 0;
}

int dlpo_map_anonymous(size_t nbytes, size_t alignment, bool huge_pages, void **address) {
    size_t page = page_size();
    if (nbytes == 0) return EINVAL;
    if (alignment < page) alignment = page;
    if (nbytes > SIZE_MAX - (page - 1)) return ENOMEM;
    size_t length = (nbytes + page - 1) & ~(page - 1);
    if (length > SIZE_MAX - (alignment - page)) return ENOMEM;
    size_t reserved = length + (alignment - page);

    char *start = mmap(NULL, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return errno;
    size_t before = (alignment - (uintptr_t)start % alignment) % alignment;
    size_t after = reserved - before - length;
    char *aligned = start + before;
    int error = 0;
    if (before && munmap(start, before)) {
        error = errno;
        munmap(start, reserved);
        return error;
    }
    if (after && munmap(aligned + length, after)) error = errno;
    if (!error && huge_pages) error = advise_huge_pages(aligned, length);
    if (error) {
        munmap(aligned, length);
        return error;
    }
    *address = aligned;
    return 0;
}

int dlpo_map_hugetlb(size_t nbytes, unsigned page_shift, void **address) {
#ifdef MAP_HUGETLB
    size_t page = (size_t)1 << page_shift;
    if (nbytes == 0) return EINVAL;
    if (nbytes > SIZE_MAX - (page - 1)) return ENOMEM;
    size_t length = (nbytes + page - 1) & ~(page - 1);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (int)(page_shift << 26); /* MAP_HUGE_SHIFT */
    void *start = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (start == MAP_FAILED) return errno;
    *address = start;
    return 0;
#else
    (void)nbytes, (void)page_shift, (void)address;
    return ENOSYS;
#endif
}

int dlpo_map_file(int descriptor, uint64_t byte_offset, size_t nbytes, void **address) {
    off_t offset = (off_t)byte_offset;
    if (offset < 0 || (uint64_t)offset != byte_offset) return EOVERFLOW;
    void *start = mmap(NULL, nbytes, PROT_READ, MAP_SHARED, descriptor, offset);
    if (start == MAP_FAILED) return errno;
    *address = start;
    return 0;
}

int dlpo_prefer_node(void *address, size_t nbytes, unsigned node) {
#if defined(__linux__) && defined(SYS_mbind)
    enum { PREFERRED = 1, BITS = 8 * sizeof(unsigned long) }; /* MPOL_PREFERRED, linux/mempolicy.h */
    unsigned long mask[1024 / BITS];
    if (node >= 1024) return EINVAL;
    memset(mask, 0, sizeof mask);
    mask[node / BITS] = 1UL << (node % BITS);
    size_t page = page_size();
    /* The kernel reads one bit less than it is told. */
    long failed = syscall(SYS_mbind, address, (nbytes + page - 1) & ~(page - 1), PREFERRED, mask, 1024 + 1, 0);
    return failed ? errno : 0;
#else
    (void)address, (void)nbytes, (void)node;
    return ENOSYS;
#endif
}

int dlpo_unmap(void *address, size_t nbytes) { return munmap(address, nbytes) ? errno : 0; }

int dlpo_dont_fork(void *address, size_t nbytes) {
#if defined(__linux__)
    return madvise(address, nbytes, MADV_DONTFORK) ? errno : 0;
#elif defined(__APPLE__)
    return minherit(address, nbytes, VM_INHERIT_NONE) ? errno : 0;
#else
    (void)address, (void)nbytes;
    return ENOSYS;
#endif
}

/* ------------------------------------------------------------------------------------------------- populate */

typedef struct {
    char *start;
    size_t page;
    bool write, advise;
} populating;

static void touch(char *start, size_t length, size_t page) {
    for (size_t at = 0; at < length; at += page) {
        volatile char *byte = start + at;
        *byte = *byte;
    }
}

/* A length of zero asks the kernel nothing but whether it knows the advice. An EINVAL of a real call can also mean
 * that the pages are not writable, and a touch would end the process. */
static bool can_populate(char *page, bool write) {
#ifdef MADV_POPULATE_WRITE
    return madvise(page, 0, write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ) == 0;
#else
    (void)page, (void)write;
    return false;
#endif
}

static int fault_in(const void *context, size_t at, size_t length) {
    const populating *range = context;
    char *start = range->start + at;
#ifdef MADV_POPULATE_WRITE
    if (range->advise) {
        int failed;
        /* Of a file: its pages are asked for at once, in long reads, before they are waited for one by one. */
        if (!range->write) madvise(start, length, MADV_WILLNEED);
        do {
            failed = madvise(start, length, range->write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
        } while (failed && errno == EINTR);
        return failed ? errno : 0;
    }
#endif
    touch(start, length, range->page);
    return 0;
}

int dlpo_populate(void *address, size_t nbytes, unsigned threads, bool write) {
    size_t page = page_size();
    uintptr_t start = (uintptr_t)address & ~(uintptr_t)(page - 1);
    if (nbytes == 0) return 0;
    if (nbytes > UINTPTR_MAX - (uintptr_t)address) return EINVAL;
    populating range = {.start = (char *)start, .page = page, .write = write};
    range.advise = can_populate(range.start, write);
    /* A touch of a file that became shorter would end the process; whoever cannot advise reads it instead. */
    if (!write && !range.advise) return ENOSYS;
    return dlpo_in_pieces((uintptr_t)address + nbytes - start, PIECE, threads, fault_in, &range);
}
