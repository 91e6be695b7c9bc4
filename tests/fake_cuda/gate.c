/* Counting calls, failing them on demand, naming errors, and handing out addresses. */
#define _GNU_SOURCE
#include "fake.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define X(name, subject) extern API int name();
CALLS(X)
#undef X

#define X(name, subject) {#name, (void *)name, subject},
static const struct {
    const char *name;
    void *function;
    int subject;
} table[] = {CALLS(X)};
#undef X

static const struct {
    int code;
    const char *name;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {NOT_READY, "CUDA_ERROR_NOT_READY"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    {NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},
    {NOT_PERMITTED, "CUDA_ERROR_NOT_PERMITTED"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    {CAPTURE_UNJOINED, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"},
    {UNKNOWN, "CUDA_ERROR_UNKNOWN"},
};

pthread_mutex_t fake_lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

#define LOG_MAX (1 << 20)
static uint8_t call_log[LOG_MAX];
static size_t logged;
static int armed = -1; /* which call, CALL_COUNT for any, -1 for none */
static long uses_left;
static int armed_result, armed_sticky;
static int sticky;
static int fired;
static char violations[1 << 14];

int gate(enum call call)
{
    int subject = table[call].subject;
    if (logged < LOG_MAX)
        call_log[logged++] = (uint8_t)call;
    if ((armed == CALL_COUNT || armed == (int)call) && --uses_left == 0) {
        armed = -1;
        fired = 1;
        if (armed_sticky)
            sticky = armed_result;
        return armed_result;
    }
    if (subject & IN_CONTEXT) {
        if (!has_context()) {
            violation("%s without a current context", table[call].name);
            return INVALID_CONTEXT;
        }
        if (sticky)
            return sticky;
    }
    if ((subject & UNSAFE) && captures_under_way() && !is_relaxed()) {
        violation("%s would break the capture of another thread", table[call].name);
        return CAPTURE_UNSUPPORTED;
    }
    return SUCCESS;
}

void violation(const char *format, ...)
{
    size_t used = strlen(violations);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(violations + used, sizeof violations - used, format, arguments);
    va_end(arguments);
    strncat(violations, "\n", sizeof violations - strlen(violations) - 1);
}

/* ---------------------------------------------------------------------------------- what the bindings ask for */
API int cuGetErrorName(int code, const char **name)
{
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) {
            *name = errors[i].name;
            return SUCCESS;
        }
    *name = NULL;
    return INVALID_VALUE;
}

API int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
    (void)version, (void)flags;
    *function = !strcmp(symbol, "cuGetErrorName") ? (void *)cuGetErrorName : NULL;
    for (int i = 0; i < CALL_COUNT; i++)
        if (!strcmp(symbol, table[i].name))
            *function = table[i].function;
    if (!strcmp(symbol, "cuGetProcAddress"))
        *function = (void *)cuGetProcAddress_v2;
    if (status)
        *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

API int cuGetProcAddress(const char *symbol, void **function, int version, uint64_t flags)
{
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}

/* -------------------------------------------------------------------------------------------- what tests use */
/* Fail the nth use from now on of a call (any call when NULL) with this result; a sticky one is never got rid of. */
API int fake_fail(const char *name, long nth, int result, int is_sticky)
{
    int found = name ? -1 : CALL_COUNT;
    for (int i = 0; name && i < CALL_COUNT; i++)
        if (!strcmp(name, table[i].name))
            found = i;
    pthread_mutex_lock(&fake_lock);
    armed = found, uses_left = nth, armed_result = result, armed_sticky = is_sticky, fired = 0;
    pthread_mutex_unlock(&fake_lock);
    return found < 0;
}

/* Whether the armed failure has happened; it is disarmed. */
API int fake_fired(void)
{
    pthread_mutex_lock(&fake_lock);
    armed = -1;
    return leave(fired);
}

/* Calls made since fake_begin, oldest first, as indices of fake_call_name. */
API size_t fake_calls(const uint8_t **calls)
{
    *calls = call_log;
    return logged;
}

API void fake_begin(void)
{
    pthread_mutex_lock(&fake_lock);
    logged = 0;
    pthread_mutex_unlock(&fake_lock);
}

API const char *fake_call_name(int call)
{
    return call >= 0 && call < CALL_COUNT ? table[call].name : NULL;
}

API const char *fake_violations(void)
{
    return violations;
}
