/* Device memory, pinned memory and registrations: tables, and the checks that CUDA makes. */
#define _GNU_SOURCE
#include "fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEVICE_TOTAL ((size_t)4 << 30)

enum kind { DEVICE, ALLOCATED, REGISTERED, KINDS };

struct range {
    uintptr_t start, end;
    enum kind kind;
    int read_only;
    struct range *next;
};

static struct range *ranges;
static size_t counts[KINDS], bytes[KINDS];

static struct range *find(uintptr_t address)
{
    for (struct range *r = ranges; r; r = r->next)
        if (r->start <= address && address < r->end)
            return r;
    return NULL;
}

static void add(uintptr_t start, size_t nbytes, enum kind kind, int read_only)
{
    struct range *made = malloc(sizeof *made);
    *made = (struct range){start, start + nbytes, kind, read_only, ranges};
    ranges = made;
    counts[kind]++;
    bytes[kind] += nbytes;
}

/* Take the range that starts here out of the table, after everything enqueued; zero when there is none. */
static int take(uintptr_t start, enum kind kind)
{
    run_everything();
    for (struct range **at = &ranges; *at; at = &(*at)->next)
        if ((*at)->start == start && (*at)->kind == kind) {
            struct range *found = *at;
            *at = found->next;
            counts[kind]--;
            bytes[kind] -= found->end - found->start;
            free(found);
            return 1;
        }
    return 0;
}

/* Whether every page is mapped: msync says ENOMEM otherwise, and MS_ASYNC does nothing else. */
static int is_mapped(uintptr_t start, uintptr_t end)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    start -= start % page;
    end += (page - end % page) % page;
    return end > start && msync((void *)start, end - start, MS_ASYNC) == 0;
}

int is_pageable(uintptr_t address)
{
    return find(address) == NULL;
}

int check_range(uintptr_t start, size_t nbytes, int writes)
{
    struct range *r = find(start);
    if (!nbytes)
        return SUCCESS;
    if (!start)
        return INVALID_VALUE;
    if (r && start + nbytes > r->end) {
        violation("%zu bytes at %#zx cross the end of an allocation", nbytes, (size_t)start);
        return INVALID_VALUE;
    }
    if (r && r->read_only && writes)
        return INVALID_VALUE;
    if (!r && !is_mapped(start, start + nbytes)) {
        violation("%zu bytes at %#zx are no memory", nbytes, (size_t)start);
        return INVALID_VALUE;
    }
    return SUCCESS;
}

void move_bytes(uintptr_t destination, uintptr_t source, size_t nbytes)
{
    if (check_range(destination, nbytes, 1) || check_range(source, nbytes, 0))
        violation("an enqueued copy of %zu bytes met memory that is gone", nbytes);
    else if (nbytes)
        memmove((void *)destination, (void *)source, nbytes);
}

void fill_bytes(uintptr_t destination, int value, size_t nbytes)
{
    if (check_range(destination, nbytes, 1))
        violation("an enqueued fill of %zu bytes met memory that is gone", nbytes);
    else if (nbytes)
        memset((void *)destination, value, nbytes);
}

/* ------------------------------------------------------------------------------------------------- allocations */
static int allocate(uintptr_t *pointer, size_t nbytes, enum kind kind)
{
    void *made;
    if (!nbytes)
        return INVALID_VALUE;
    if (bytes[kind] + nbytes > DEVICE_TOTAL || posix_memalign(&made, 4096, nbytes))
        return OUT_OF_MEMORY;
    memset(made, 0xa5, nbytes); /* nobody may count on zeros */
    add((uintptr_t)made, nbytes, kind, 0);
    *pointer = (uintptr_t)made;
    return SUCCESS;
}

static int release(uintptr_t pointer, enum kind kind)
{
    if (!take(pointer, kind)) {
        violation("nothing was allocated at %#zx", (size_t)pointer);
        return INVALID_VALUE;
    }
    free((void *)pointer);
    return SUCCESS;
}

API int cuMemGetInfo(size_t *free_nbytes, size_t *total_nbytes)
{
    ENTER(cuMemGetInfo);
    *free_nbytes = DEVICE_TOTAL - bytes[DEVICE];
    *total_nbytes = DEVICE_TOTAL;
    return leave(SUCCESS);
}

API int cuMemAlloc(uintptr_t *pointer, size_t nbytes)
{
    ENTER(cuMemAlloc);
    return leave(allocate(pointer, nbytes, DEVICE));
}

API int cuMemFree(uintptr_t pointer)
{
    ENTER(cuMemFree);
    return leave(release(pointer, DEVICE));
}

API int cuMemHostAlloc(uintptr_t *pointer, size_t nbytes, unsigned flags)
{
    ENTER(cuMemHostAlloc);
    return leave(flags & ~7u ? INVALID_VALUE : allocate(pointer, nbytes, ALLOCATED));
}

API int cuMemFreeHost(uintptr_t pointer)
{
    ENTER(cuMemFreeHost);
    return leave(release(pointer, ALLOCATED));
}

/* ----------------------------------------------------------------------------------------------- registrations */
/* What the mappings of a range are: CUDA pins a file's pages for reading only, and a private one's not at all. */
static int check_mappings(uintptr_t start, uintptr_t end, int read_only)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512], may[5], path[256];
    size_t from, to, offset, inode;
    int result = SUCCESS;
    while (maps && fgets(line, sizeof line, maps)) {
        path[0] = '\0';
        if (sscanf(line, "%zx-%zx %4s %zx %*s %zu %255s", &from, &to, may, &offset, &inode, path) < 5)
            continue;
        if (to <= start || from >= end)
            continue;
        /* tmpfs is none: shared anonymous memory (/dev/zero), memfd, /dev/shm */
        int is_file = inode && strncmp(path, "/dev/", 5) && strncmp(path, "/memfd:", 7);
        if (read_only && is_file && may[3] == 'p') {
            violation("a private mapping of a file registered read-only: the driver would never return");
            result = INVALID_VALUE;
        } else if (!read_only && (may[1] != 'w' || (is_file && may[3] == 's')))
            result = INVALID_VALUE;
    }
    if (maps)
        fclose(maps);
    return result;
}

API int cuMemHostRegister(uintptr_t start, size_t nbytes, unsigned flags)
{
    ENTER(cuMemHostRegister);
    if (!nbytes || flags & ~0xfu || !is_mapped(start, start + nbytes))
        return leave(INVALID_VALUE);
    for (struct range *r = ranges; r; r = r->next)
        if (r->kind != DEVICE && r->start < start + nbytes && start < r->end)
            return leave(ALREADY_REGISTERED);
    int result = check_mappings(start, start + nbytes, !!(flags & 8));
    if (!result)
        add(start, nbytes, REGISTERED, !!(flags & 8));
    return leave(result);
}

API int cuMemHostUnregister(uintptr_t start)
{
    ENTER(cuMemHostUnregister);
    struct range *r = find(start);
    if (r && r->kind == REGISTERED && !is_mapped(r->start, r->end))
        violation("%#zx was unmapped while it was registered", (size_t)start);
    return leave(take(start, REGISTERED) ? SUCCESS : NOT_REGISTERED);
}

API int cuMemHostGetDevicePointer(uintptr_t *pointer, uintptr_t host, unsigned flags)
{
    ENTER(cuMemHostGetDevicePointer);
    struct range *r = find(host);
    if (flags || !r || r->kind == DEVICE)
        return leave(INVALID_VALUE);
    *pointer = host;
    return leave(SUCCESS);
}

API int cuPointerGetAttribute(void *value, int attribute, uintptr_t pointer)
{
    ENTER(cuPointerGetAttribute);
    struct range *r = find(pointer);
    if (!r)
        return leave(INVALID_VALUE);
    switch (attribute) {
    case 2: /* MEMORY_TYPE: 1 is the host's, 2 the device's */
        *(unsigned *)value = r->kind == DEVICE ? 2 : 1;
        return leave(SUCCESS);
    case 8: /* IS_MANAGED */
        *(unsigned char *)value = 0;
        return leave(SUCCESS);
    case 9: /* DEVICE_ORDINAL */
        *(int *)value = 0;
        return leave(SUCCESS);
    default:
        return leave(INVALID_VALUE);
    }
}

/* ---------------------------------------------------------------------------------------------- what tests use */
API size_t fake_live(int kind)
{
    return kind >= 0 && kind < KINDS ? counts[kind] : 0;
}

API size_t fake_live_nbytes(int kind)
{
    return kind >= 0 && kind < KINDS ? bytes[kind] : 0;
}

/* Registrations whose pages are no longer mapped: the device could still write there. */
API int fake_unmapped_registrations(void)
{
    int found = 0;
    pthread_mutex_lock(&fake_lock);
    for (struct range *r = ranges; r; r = r->next)
        found += r->kind == REGISTERED && !is_mapped(r->start, r->end);
    return leave(found);
}
