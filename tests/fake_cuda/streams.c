/* Streams as queues that run as late as they may, events, and captures into graphs. */
#include "fake.h"

#include <stdlib.h>
#include <string.h>

enum what { COPY, FILL, RECORD, WAIT };

struct event;

struct operation {
    enum what what;
    uintptr_t destination, source;
    size_t nbytes;
    int value;
    struct stream *on; /* of a wait: until this stream has run so many operations */
    uint64_t until;
    struct event *event;
    struct operation *next;
};

struct object {
    void *argument;
    void (*destroy)(void *);
    int references;
    struct object *next;
};

struct graph {
    uint64_t id;
    struct operation *first, **last;
    struct object *objects; /* those it retains */
    struct stream *origin;
    int broken;
    struct graph *next;
};

struct stream {
    struct operation *first, **last;
    uint64_t enqueued, run;
    struct graph *capture;
    uint64_t captured, joined; /* operations in the capture, and how many of them another stream waits for */
    struct stream *next;
};

struct event {
    struct stream *on; /* NULL: not recorded, or reached for ever */
    uint64_t until;
    struct graph *capture;
    int timing, recorded;
    double at_ms;
    struct event *next;
};

static struct stream legacy = {.last = &legacy.first};
static struct stream *streams;
static struct event *events;
static struct graph *capturing;
static struct object *objects;
static uint64_t captures;
static double clock_ms;
static int eager;

int captures_under_way(void)
{
    return capturing != NULL;
}

static struct stream *stream_of(uintptr_t handle)
{
    if (handle <= 2) /* the legacy stream, and the thread's own, which nobody here uses */
        return &legacy;
    for (struct stream *s = streams; s; s = s->next)
        if ((uintptr_t)s == handle)
            return s;
    violation("stream %#zx does not exist", (size_t)handle);
    return NULL;
}

static struct event *event_of(uintptr_t handle)
{
    for (struct event *e = events; e; e = e->next)
        if ((uintptr_t)e == handle)
            return e;
    violation("event %#zx does not exist", (size_t)handle);
    return NULL;
}

/* ------------------------------------------------------------------------------------------------- running */
static void run_until(struct stream *stream, uint64_t until)
{
    while (stream->run < until && stream->first) {
        struct operation *op = stream->first;
        stream->first = op->next;
        if (!stream->first)
            stream->last = &stream->first;
        if (op->what == COPY)
            move_bytes(op->destination, op->source, op->nbytes);
        else if (op->what == FILL)
            fill_bytes(op->destination, op->value, op->nbytes);
        else if (op->what == WAIT && op->on)
            run_until(op->on, op->until);
        else if (op->what == RECORD && event_of((uintptr_t)op->event))
            op->event->at_ms = clock_ms += 1.0;
        stream->run++;
        free(op);
    }
}

static void run_stream(struct stream *stream)
{
    run_until(stream, stream->enqueued);
}

void run_everything(void)
{
    run_stream(&legacy);
    for (struct stream *s = streams; s; s = s->next)
        run_stream(s);
}

static void append(struct operation ***last, struct operation op)
{
    struct operation *made = malloc(sizeof *made);
    *made = op;
    made->next = NULL;
    **last = made;
    *last = &made->next;
}

static void enqueue(struct stream *stream, struct operation op)
{
    if (stream->capture) {
        if (op.what == COPY || op.what == FILL)
            append(&stream->capture->last, op);
        stream->captured++;
        return;
    }
    append(&stream->last, op);
    stream->enqueued++;
    if (eager)
        run_stream(stream);
}

static int broken(struct graph *graph, int result)
{
    graph->broken = 1;
    return result;
}

/* -------------------------------------------------------------------------------------------------- copies */
static int copy(uintptr_t destination, uintptr_t source, size_t nbytes, struct stream *stream)
{
    int result = check_range(destination, nbytes, 1);
    if (!result)
        result = check_range(source, nbytes, 0);
    if (result)
        return result;
    enqueue(stream, (struct operation){.what = COPY, .destination = destination, .source = source, .nbytes = nbytes});
    if (!stream->capture && (is_pageable(destination) || is_pageable(source)))
        run_stream(stream); /* the driver stages pageable memory before it returns */
    return SUCCESS;
}

API int cuMemcpyAsync(uintptr_t destination, uintptr_t source, size_t nbytes, uintptr_t stream)
{
    ENTER(cuMemcpyAsync);
    struct stream *s = stream_of(stream);
    return leave(s ? copy(destination, source, nbytes, s) : INVALID_HANDLE);
}

API int cuMemcpy(uintptr_t destination, uintptr_t source, size_t nbytes)
{
    ENTER(cuMemcpy);
    int result = copy(destination, source, nbytes, &legacy);
    run_stream(&legacy);
    return leave(result);
}

API int cuMemsetD8Async(uintptr_t destination, unsigned char value, size_t nbytes, uintptr_t stream)
{
    ENTER(cuMemsetD8Async);
    struct stream *s = stream_of(stream);
    int result = s ? check_range(destination, nbytes, 1) : INVALID_HANDLE;
    if (!result)
        enqueue(s, (struct operation){.what = FILL, .destination = destination, .nbytes = nbytes, .value = value});
    return leave(result);
}

/* ------------------------------------------------------------------------------------------------- streams */
API int cuStreamCreate(uintptr_t *stream, unsigned flags)
{
    ENTER(cuStreamCreate);
    if (flags > 1)
        return leave(INVALID_VALUE);
    struct stream *made = calloc(1, sizeof *made);
    made->last = &made->first;
    made->next = streams;
    streams = made;
    *stream = (uintptr_t)made;
    return leave(SUCCESS);
}

API int cuStreamDestroy(uintptr_t stream)
{
    ENTER(cuStreamDestroy);
    struct stream *s = stream_of(stream);
    if (!s || s == &legacy)
        return leave(INVALID_HANDLE);
    run_everything(); /* what it holds still runs; nothing here refers to it afterwards */
    for (struct event *e = events; e; e = e->next)
        if (e->on == s)
            e->on = NULL;
    for (struct stream **at = &streams; *at; at = &(*at)->next)
        if (*at == s) {
            *at = s->next;
            break;
        }
    free(s);
    return leave(SUCCESS);
}

API int cuStreamSynchronize(uintptr_t stream)
{
    ENTER(cuStreamSynchronize);
    struct stream *s = stream_of(stream);
    if (!s)
        return leave(INVALID_HANDLE);
    if (s->capture)
        return leave(broken(s->capture, CAPTURE_UNSUPPORTED));
    run_stream(s);
    return leave(SUCCESS);
}

API int cuCtxSynchronize(void)
{
    ENTER(cuCtxSynchronize);
    run_everything();
    return leave(SUCCESS);
}

API int cuStreamWaitEvent(uintptr_t stream, uintptr_t event, unsigned flags)
{
    ENTER(cuStreamWaitEvent);
    struct stream *s = stream_of(stream);
    struct event *e = event_of(event);
    if (!s || !e || flags)
        return leave(flags ? INVALID_VALUE : INVALID_HANDLE);
    if (e->capture) {
        if (s->capture && s->capture != e->capture)
            return leave(broken(s->capture, CAPTURE_ISOLATION));
        if (!s->capture)
            s->captured = s->joined = 0;
        s->capture = e->capture;
        s->captured++;
        if (e->on && e->on != s && e->until > e->on->joined)
            e->on->joined = e->until;
        return leave(SUCCESS);
    }
    if (s->capture)
        return leave(e->recorded ? broken(s->capture, CAPTURE_ISOLATION) : SUCCESS);
    if (e->on)
        enqueue(s, (struct operation){.what = WAIT, .on = e->on, .until = e->until});
    return leave(SUCCESS);
}

/* -------------------------------------------------------------------------------------------------- events */
API int cuEventCreate(uintptr_t *event, unsigned flags)
{
    ENTER(cuEventCreate);
    if (flags & ~3u)
        return leave(INVALID_VALUE);
    struct event *made = calloc(1, sizeof *made);
    made->timing = !(flags & 2);
    made->next = events;
    events = made;
    *event = (uintptr_t)made;
    return leave(SUCCESS);
}

API int cuEventDestroy(uintptr_t event)
{
    ENTER(cuEventDestroy);
    struct event *e = event_of(event);
    if (!e)
        return leave(INVALID_HANDLE);
    if (e->timing) /* its records are still to be run, and are looked up */
        run_everything();
    for (struct event **at = &events; *at; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    free(e);
    return leave(SUCCESS);
}

API int cuEventRecord(uintptr_t event, uintptr_t stream)
{
    ENTER(cuEventRecord);
    struct stream *s = stream_of(stream);
    struct event *e = event_of(event);
    if (!s || !e)
        return leave(INVALID_HANDLE);
    if (e->timing)
        enqueue(s, (struct operation){.what = RECORD, .event = e});
    e->recorded = 1;
    e->on = s;
    e->capture = s->capture;
    e->until = s->capture ? s->captured : s->enqueued;
    return leave(SUCCESS);
}

static int is_reached(const struct event *event)
{
    return !event->on || event->on->run >= event->until;
}

API int cuEventQuery(uintptr_t event)
{
    ENTER(cuEventQuery);
    struct event *e = event_of(event);
    if (!e)
        return leave(INVALID_HANDLE);
    if (e->capture)
        return leave(broken(e->capture, CAPTURE_UNSUPPORTED));
    if (is_reached(e))
        return leave(SUCCESS);
    run_until(e->on, e->on->run + 1); /* whoever asks again and again is to come to an end */
    return leave(is_reached(e) ? SUCCESS : NOT_READY);
}

API int cuEventSynchronize(uintptr_t event)
{
    ENTER(cuEventSynchronize);
    struct event *e = event_of(event);
    if (!e)
        return leave(INVALID_HANDLE);
    if (e->capture)
        return leave(broken(e->capture, CAPTURE_UNSUPPORTED));
    if (e->on)
        run_until(e->on, e->until);
    return leave(SUCCESS);
}

API int cuEventElapsedTime(float *milliseconds, uintptr_t start, uintptr_t end)
{
    ENTER(cuEventElapsedTime);
    struct event *from = event_of(start), *to = event_of(end);
    if (!from || !to || !from->timing || !to->timing || !from->recorded || !to->recorded)
        return leave(INVALID_HANDLE);
    if (!is_reached(from) || !is_reached(to))
        return leave(NOT_READY);
    *milliseconds = (float)(to->at_ms - from->at_ms);
    return leave(SUCCESS);
}

/* ------------------------------------------------------------------------------------------------ captures */
API int cuStreamIsCapturing(uintptr_t stream, int *status)
{
    ENTER(cuStreamIsCapturing);
    struct stream *s = stream_of(stream);
    if (!s)
        return leave(INVALID_HANDLE);
    *status = !s->capture ? 0 : s->capture->broken ? 2 : 1;
    return leave(SUCCESS);
}

/* As of version 12.3, with data on edges; dependencies are not told. */
API int cuStreamGetCaptureInfo(uintptr_t stream, int *status, uint64_t *id, struct graph **graph, const void **nodes,
                               const void **edges, size_t *count)
{
    ENTER(cuStreamGetCaptureInfo);
    struct stream *s = stream_of(stream);
    if (!s)
        return leave(INVALID_HANDLE);
    *status = !s->capture ? 0 : s->capture->broken ? 2 : 1;
    if (*status == 1) {
        if (id)
            *id = s->capture->id;
        if (graph)
            *graph = s->capture;
        if (nodes)
            *nodes = NULL;
        if (edges)
            *edges = NULL;
        if (count)
            *count = 0;
    }
    return leave(SUCCESS);
}

API int cuUserObjectCreate(struct object **object, void *argument, void (*destroy)(void *), unsigned references,
                           unsigned flags)
{
    ENTER(cuUserObjectCreate);
    if (flags != 1 || !references)
        return leave(INVALID_VALUE);
    struct object *made = calloc(1, sizeof *made);
    *made = (struct object){argument, destroy, (int)references, objects};
    objects = made;
    *object = made;
    return leave(SUCCESS);
}

static void drop(struct object *object, int references)
{
    object->references -= references;
    if (object->references > 0)
        return;
    for (struct object **at = &objects; *at; at = &(*at)->next)
        if (*at == object) {
            *at = object->next;
            break;
        }
    object->destroy(object->argument);
    free(object);
}

API int cuUserObjectRelease(struct object *object, unsigned references)
{
    ENTER(cuUserObjectRelease);
    drop(object, (int)references);
    return leave(SUCCESS);
}

API int cuGraphRetainUserObject(struct graph *graph, struct object *object, unsigned references, unsigned flags)
{
    ENTER(cuGraphRetainUserObject);
    if (flags > 1)
        return leave(INVALID_VALUE);
    object->references += (int)references;
    struct object *held = calloc(1, sizeof *held); /* whom the graph holds, and how often */
    *held = (struct object){object, NULL, (int)references, graph->objects};
    graph->objects = held;
    return leave(SUCCESS);
}

/* ------------------------------------------------------------------------------------------ what tests use */
/* Run what is enqueued at once, instead of as late as it may. */
API void fake_run_at_once(int on)
{
    eager = on;
}

/* Run what is enqueued on a stream, without a call of the driver. */
API void fake_run(uintptr_t stream)
{
    pthread_mutex_lock(&fake_lock);
    run_stream(stream_of(stream));
    pthread_mutex_unlock(&fake_lock);
}

API size_t fake_live_streams(void)
{
    size_t found = 0;
    for (struct stream *s = streams; s; s = s->next)
        found++;
    return found;
}

API size_t fake_live_events(void)
{
    size_t found = 0;
    for (struct event *e = events; e; e = e->next)
        found++;
    return found;
}

API size_t fake_live_user_objects(void)
{
    size_t found = 0;
    for (struct object *o = objects; o; o = o->next)
        found++;
    return found;
}

/* cuStreamBeginCapture, in global mode. */
API int fake_capture_begin(uintptr_t stream)
{
    pthread_mutex_lock(&fake_lock);
    struct stream *s = stream_of(stream);
    if (!s || s->capture)
        return leave(INVALID_HANDLE);
    struct graph *made = calloc(1, sizeof *made);
    *made = (struct graph){.id = ++captures, .origin = s, .next = capturing};
    made->last = &made->first;
    capturing = s->capture = made;
    s->captured = s->joined = 0;
    return leave(SUCCESS);
}

/* cuStreamEndCapture: what came of it stands in `result`. The graph is there all the same, to be destroyed. */
API struct graph *fake_capture_end(uintptr_t stream, int *result)
{
    pthread_mutex_lock(&fake_lock);
    struct graph *graph = stream_of(stream)->capture;
    *result = graph->broken ? CAPTURE_INVALIDATED : SUCCESS;
    for (struct stream *s = streams; s; s = s->next)
        if (s->capture == graph) {
            if (s != graph->origin && s->joined < s->captured && !graph->broken)
                *result = CAPTURE_UNJOINED;
            s->capture = NULL;
        }
    graph->origin->capture = NULL;
    for (struct event *e = events; e; e = e->next)
        if (e->capture == graph)
            e->capture = NULL, e->on = NULL, e->recorded = 0;
    for (struct graph **at = &capturing; *at; at = &(*at)->next)
        if (*at == graph) {
            *at = graph->next;
            break;
        }
    pthread_mutex_unlock(&fake_lock);
    return graph;
}

/* cuGraphLaunch. */
API void fake_graph_launch(struct graph *graph, uintptr_t stream)
{
    pthread_mutex_lock(&fake_lock);
    struct stream *s = stream_of(stream);
    for (struct operation *op = graph->first; op; op = op->next)
        enqueue(s, *op);
    pthread_mutex_unlock(&fake_lock);
}

/* cuGraphDestroy, when nothing replays it any more. */
API void fake_graph_destroy(struct graph *graph)
{
    pthread_mutex_lock(&fake_lock);
    run_everything();
    while (graph->objects) {
        struct object *held = graph->objects;
        graph->objects = held->next;
        drop(held->argument, held->references);
        free(held);
    }
    while (graph->first) {
        struct operation *op = graph->first;
        graph->first = op->next;
        free(op);
    }
    free(graph);
    pthread_mutex_unlock(&fake_lock);
}
