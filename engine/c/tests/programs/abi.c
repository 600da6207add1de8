/*
 * What C programs may do to the library, right and wrong. `abi TEST MODEL_DIR …` runs one test and
 * exits with 0 where all is as it has to be.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bespoke.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s; last error: %s\n", __FILE__, __LINE__, #condition, \
                    bespoke_last_error());                                                         \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

/* The call gives the status, and for errors the words. */
#define EXPECT(status, words, call)                                                               \
    do {                                                                                           \
        const BespokeStatus got = (call);                                                          \
        if (got != (status) || ((status) < 0 && !strstr(bespoke_last_error(), (words)))) {         \
            fprintf(stderr, "%s:%d: %s is \"%s\", not \"%s\" with \"%s\"; last error: %s\n",       \
                    __FILE__, __LINE__, #call, bespoke_status_name(got),                           \
                    bespoke_status_name(status), (words), bespoke_last_error());                   \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#define OK(call) EXPECT(BESPOKE_STATUS_OK, "", call)
#define ARGUMENT(words, call) EXPECT(BESPOKE_STATUS_INVALID_ARGUMENT, words, call)
#define HANDLE(words, call) EXPECT(BESPOKE_STATUS_INVALID_HANDLE, words, call)

enum { IDS_MAX = 4096, NUM_THREADS = 8 };

static const uint32_t PROMPT_IDS[] = {5, 6, 7};

typedef struct Tokens {
    uint32_t ids[IDS_MAX];
    size_t num_ids;
    size_t num_events;
    /* Asks for the end at this event; 0 for never. */
    size_t cancel_at;
    /* Closed by the first event; 0 for none. */
    BespokeEngine close;
    int32_t finish_reason;
} Tokens;

static void take(Tokens *tokens, const BespokeEvent *event) {
    CHECK(event->size == sizeof *event);
    CHECK(event->text != NULL && event->text[event->text_len] == '\0');
    CHECK(tokens->finish_reason == BESPOKE_FINISH_REASON_NONE);
    for (size_t idx = 0; idx < event->num_ids && tokens->num_ids < IDS_MAX; idx++) {
        tokens->ids[tokens->num_ids++] = event->ids[idx];
    }
    tokens->num_events++;
    tokens->finish_reason = event->finish_reason;
}

static int32_t on_event(void *user, const BespokeEvent *event) {
    Tokens *tokens = user;
    take(tokens, event);
    if (tokens->close != 0) {
        OK(bespoke_engine_close(tokens->close));
        tokens->close = 0;
    }
    return tokens->num_events == tokens->cancel_at;
}

/* The status of the first call that is not OK. */
static BespokeStatus read_all(BespokeRequest request, Tokens *tokens) {
    for (;;) {
        BespokeEvent event = {.size = sizeof event};
        const BespokeStatus status = bespoke_next(request, -1, &event);
        if (status != BESPOKE_STATUS_OK) {
            return status;
        }
        take(tokens, &event);
    }
}

static BespokeEngine open_on(const char *model_dir, int32_t backend) {
    BespokeEngineOptions options = {
        .size = sizeof options, .backend = backend, .num_threads = 1, .max_sequences = 4};
    BespokeEngine engine = 0;
    OK(bespoke_engine_open(model_dir, &options, &engine));
    CHECK(engine != 0);
    return engine;
}

static BespokeParams ids_params(size_t max_tokens) {
    const BespokeParams params = {.size = sizeof params,
                                  .prompt_ids = PROMPT_IDS,
                                  .num_prompt_ids = 3,
                                  .max_tokens = max_tokens,
                                  .ignore_eos = 1};
    return params;
}

/* --- Tokens: the same by both ways --- */

static void test_tokens(const char *model_dir) {
    const BespokeEngine engine = open_on(model_dir, BESPOKE_BACKEND_REFERENCE);
    const BespokeParams params = ids_params(20);
    static Tokens pushed, pulled;
    OK(bespoke_generate(engine, &params, on_event, &pushed));
    BespokeRequest request;
    OK(bespoke_start(engine, &params, &request));
    EXPECT(BESPOKE_STATUS_ENDED, "", read_all(request, &pulled));
    OK(bespoke_request_free(request));
    OK(bespoke_engine_close(engine));
    CHECK(pushed.finish_reason == BESPOKE_FINISH_REASON_LENGTH);
    CHECK(memcmp(&pushed, &pulled, sizeof pushed) == 0);
    for (size_t idx = 0; idx < pushed.num_ids; idx++) {
        printf("%u\n", (unsigned)pushed.ids[idx]);
    }
}

/* --- Misuse --- */

static void misuse_open(const char *model_dir) {
    BespokeEngine engine = 1;
    BespokeEngineOptions options = {.size = sizeof options, .backend = BESPOKE_BACKEND_NULL};
    ARGUMENT("model_dir is null", bespoke_engine_open(NULL, &options, &engine));
    CHECK(engine == 0);
    ARGUMENT("engine is null", bespoke_engine_open(model_dir, &options, NULL));
    _Alignas(16) char place[32];
    BespokeEngine *misaligned = (BespokeEngine *)(void *)(place + 1);
    ARGUMENT("not aligned", bespoke_engine_open(model_dir, &options, misaligned));
    ARGUMENT("no UTF-8: byte 1", bespoke_engine_open("a\xff", &options, &engine));
    EXPECT(BESPOKE_STATUS_IO, "config.json", bespoke_engine_open("/no/such", NULL, &engine));
    char *endless = malloc(1 << 16);
    CHECK(endless != NULL);
    memset(endless, 'x', 1 << 16);
    ARGUMENT("no end within", bespoke_engine_open(endless, &options, &engine));
    free(endless);

    options.size = 0;
    ARGUMENT("sizeof(BespokeEngineOptions)", bespoke_engine_open(model_dir, &options, &engine));
    options.size = 1 << 20;
    ARGUMENT("sizeof(BespokeEngineOptions)", bespoke_engine_open(model_dir, &options, &engine));
    options.size = sizeof options;
    options.backend = 99;
    ARGUMENT("backend is 99", bespoke_engine_open(model_dir, &options, &engine));
    options.backend = BESPOKE_BACKEND_NULL;
    options.kv_type = -1;
    ARGUMENT("kv_type is -1", bespoke_engine_open(model_dir, &options, &engine));
    options.kv_type = 0;
    options.activations = 4;
    ARGUMENT("activations is 4", bespoke_engine_open(model_dir, &options, &engine));
    options.activations = 0;
    options.num_threads = UINT32_MAX;
    ARGUMENT("num_threads is 4294967295", bespoke_engine_open(model_dir, &options, &engine));
    options.num_threads = 0;
    options.max_sequences = SIZE_MAX;
    ARGUMENT("max_sequences", bespoke_engine_open(model_dir, &options, &engine));
    options.max_sequences = 0;
    options.max_context = 1;
    ARGUMENT("max_context is 1", bespoke_engine_open(model_dir, &options, &engine));
    options.max_context = SIZE_MAX;
    ARGUMENT("max_context", bespoke_engine_open(model_dir, &options, &engine));
    CHECK(engine == 0);
}

/* Programs that are older or newer than the library. */
static void other_versions(const char *model_dir) {
    BespokeEngine engine = 0;
    const struct {
        size_t size;
        int32_t backend;
    } old_options = {12, BESPOKE_BACKEND_NULL};
    const BespokeEngineOptions *options = (const void *)&old_options;
    OK(bespoke_engine_open(model_dir, options, &engine));
    size_t old_info[3] = {2 * sizeof(size_t), 0, 7};
    OK(bespoke_engine_info(engine, (void *)old_info));
    CHECK(old_info[0] == 2 * sizeof(size_t) && old_info[1] > 0 && old_info[2] == 7);
    struct {
        BespokeEngineInfo known;
        size_t more;
    } new_info = {.known = {.size = sizeof new_info}, .more = 7};
    OK(bespoke_engine_info(engine, &new_info.known));
    CHECK(new_info.known.size == sizeof new_info && new_info.more == 0);
    CHECK(new_info.known.backend == BESPOKE_BACKEND_NULL && new_info.known.has_tokenizer == 1);
    CHECK(new_info.known.has_chat_template == 1 && new_info.known.max_context > 0);
    OK(bespoke_engine_close(engine));

    struct {
        BespokeEngineOptions known;
        size_t more;
    } new_options = {.known = {.size = sizeof new_options, .backend = BESPOKE_BACKEND_NULL}};
    OK(bespoke_engine_open(model_dir, &new_options.known, &engine));
    OK(bespoke_engine_close(engine));
    new_options.more = 1;
    EXPECT(BESPOKE_STATUS_UNSUPPORTED, "newer library",
           bespoke_engine_open(model_dir, &new_options.known, &engine));
}

static void misuse_params(BespokeEngine engine) {
    BespokeParams params = ids_params(4);
    Tokens tokens = {0};
    ARGUMENT("params is null", bespoke_generate(engine, NULL, on_event, &tokens));
    ARGUMENT("callback is null", bespoke_generate(engine, &params, NULL, NULL));
    ARGUMENT("request is null", bespoke_start(engine, &params, NULL));
    const BespokeParams empty = {.size = sizeof empty};
    ARGUMENT("there is no prompt", bespoke_generate(engine, &empty, on_event, &tokens));

/* One field that is wrong. */
#define WRONG(words, change)                                                                       \
    do {                                                                                           \
        params = ids_params(4);                                                                    \
        change;                                                                                    \
        ARGUMENT(words, bespoke_generate(engine, &params, on_event, &tokens));                     \
    } while (0)

    const char *const stops[] = {"x", NULL};
    const char *const empty_stop[] = {""};
    const uint32_t far_ids[] = {1, 100000};
    WRONG("not several", params.prompt = "x");
    WRONG("outside the vocabulary", params.prompt_ids = far_ids; params.num_prompt_ids = 2);
    WRONG("prompt_ids is null", params.prompt_ids = NULL);
    WRONG("prompt_ids has", params.num_prompt_ids = SIZE_MAX);
    WRONG("not aligned", params.prompt_ids = (const void *)((const char *)PROMPT_IDS + 1));
    WRONG("temperature is NaN", params.temperature = (float)strtod("nan", NULL));
    WRONG("top_p is 2", params.top_p = 2.0F);
    WRONG("stop string is null", params.stop_strings = stops; params.num_stop_strings = 2);
    WRONG("stop string is empty", params.stop_strings = empty_stop; params.num_stop_strings = 1);
    WRONG("stop_strings has 17", params.stop_strings = stops; params.num_stop_strings = 17);
    WRONG("outside the vocabulary", params.stop_ids = far_ids; params.num_stop_ids = 2);
    WRONG("name a session", params.session = "../x");
    WRONG("session is null", params.session_flags = BESPOKE_SESSION_FLAGS_START);
    WRONG("session_flags is 4", params.session = "s"; params.session_flags = 4);
    WRONG("no session s", params.session = "s");
#undef WRONG
    const BespokeParams bad_text = {.size = sizeof bad_text, .prompt = "\xc3\x28"};
    ARGUMENT("no UTF-8: byte 0", bespoke_generate(engine, &bad_text, on_event, &tokens));
    const BespokeParams bad_json = {.size = sizeof bad_json, .messages = "[{]"};
    ARGUMENT("JSON", bespoke_generate(engine, &bad_json, on_event, &tokens));
    CHECK(tokens.num_events == 0);
}

static void misuse_handles(BespokeEngine engine) {
    const BespokeParams params = ids_params(4);
    Tokens tokens = {0};
    BespokeEvent event = {.size = sizeof event};
    BespokeRequest request = 0;
    OK(bespoke_start(engine, &params, &request));
    HANDLE("is null", bespoke_engine_close(0));
    HANDLE("never given out", bespoke_engine_close(UINT64_MAX));
    HANDLE("is a request", bespoke_engine_close(request));
    HANDLE("is a request", bespoke_generate(request, &params, on_event, &tokens));
    HANDLE("is an engine", bespoke_next(engine, 0, &event));
    HANDLE("is an engine", bespoke_cancel(engine));
    HANDLE("is an engine", bespoke_request_free(engine));
    ARGUMENT("BespokeEvent is null", bespoke_next(request, 0, NULL));
    event.size = 1;
    ARGUMENT("sizeof(BespokeEvent)", bespoke_next(request, 0, &event));
    EXPECT(BESPOKE_STATUS_ENDED, "", read_all(request, &tokens));
    CHECK(tokens.num_ids == 4);
    event.size = sizeof event;
    EXPECT(BESPOKE_STATUS_ENDED, "", bespoke_next(request, -1, &event));
    OK(bespoke_cancel(request));
    OK(bespoke_request_free(request));
    HANDLE("was closed or freed", bespoke_request_free(request));
    HANDLE("was closed or freed", bespoke_cancel(request));
    HANDLE("was closed or freed", bespoke_next(request, 0, &event));
    BespokeRequest next_request = 0;
    OK(bespoke_start(engine, &params, &next_request));
    CHECK(next_request != request);
    OK(bespoke_request_free(next_request));
}

static void misuse_closed(const char *model_dir) {
    const BespokeEngine other = open_on(model_dir, BESPOKE_BACKEND_NULL);
    const BespokeEngine engine = open_on(model_dir, BESPOKE_BACKEND_NULL);
    BespokeParams params = ids_params(SIZE_MAX);
    static Tokens tokens, of_other;
    BespokeRequest request = 0;
    OK(bespoke_start(engine, &params, &request));
    OK(bespoke_engine_close(engine));
    EXPECT(BESPOKE_STATUS_ENDED, "", read_all(request, &tokens));
    CHECK(tokens.finish_reason == BESPOKE_FINISH_REASON_CANCELLED);
    OK(bespoke_cancel(request));
    OK(bespoke_request_free(request));

    BespokeEngineInfo info = {.size = sizeof info};
    size_t num = 0;
    HANDLE("was closed or freed", bespoke_engine_close(engine));
    HANDLE("was closed or freed", bespoke_start(engine, &params, &request));
    CHECK(request == 0);
    HANDLE("was closed or freed", bespoke_engine_info(engine, &info));
    HANDLE("was closed or freed", bespoke_tokenize(engine, "x", 1, 0, NULL, 0, &num));
    HANDLE("was closed or freed", bespoke_detokenize(engine, PROMPT_IDS, 3, NULL, 0, &num));
    HANDLE("was closed or freed", bespoke_session_end(engine, "s"));
    params.max_tokens = 4;
    OK(bespoke_generate(other, &params, on_event, &of_other));
    CHECK(of_other.num_ids == 4);
    OK(bespoke_engine_close(other));
}

static void *fail_elsewhere(void *user) {
    (void)user;
    CHECK(strcmp(bespoke_last_error(), "") == 0);
    HANDLE("is null", bespoke_engine_close(0));
    return NULL;
}

static void test_misuse(const char *model_dir) {
    CHECK(bespoke_abi_version() == BESPOKE_ABI_VERSION);
    CHECK(strchr(bespoke_version(), '.') != NULL);
    CHECK(strcmp(bespoke_status_name(BESPOKE_STATUS_BUSY), "busy") == 0);
    CHECK(strcmp(bespoke_status_name(12345), "unknown") == 0);
    misuse_open(model_dir);
    other_versions(model_dir);
    const BespokeEngine engine = open_on(model_dir, BESPOKE_BACKEND_NULL);
    misuse_params(engine);
    misuse_handles(engine);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, fail_elsewhere, NULL) == 0);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(strstr(bespoke_last_error(), "was closed or freed") != NULL);
    OK(bespoke_engine_close(engine));
    misuse_closed(model_dir);
}

/* --- Text and sessions --- */

static void test_text(const char *model_dir) {
    const BespokeEngine engine = open_on(model_dir, BESPOKE_BACKEND_NULL);
    size_t num = 0;
    uint32_t ids[8] = {0};
    OK(bespoke_tokenize(engine, "a\0\xc3\xa9", 4, 0, NULL, 0, &num));
    CHECK(num == 4);
    EXPECT(BESPOKE_STATUS_BUFFER_TOO_SMALL, "4 are needed",
           bespoke_tokenize(engine, "a\0\xc3\xa9", 4, 0, ids, 3, &num));
    CHECK(ids[0] == 0);
    OK(bespoke_tokenize(engine, "a\0\xc3\xa9", 4, 0, ids, 4, &num));
    CHECK(num == 4 && ids[0] == 'a' && ids[1] == 0 && ids[2] == 0xc3 && ids[3] == 0xa9);
    OK(bespoke_tokenize(engine, NULL, 0, 0, ids, 0, &num));
    CHECK(num == 0);
    ARGUMENT("text is null", bespoke_tokenize(engine, NULL, 1, 0, ids, 8, &num));
    ARGUMENT("no UTF-8", bespoke_tokenize(engine, "\xc3", 1, 0, ids, 8, &num));
    ARGUMENT("length is null", bespoke_tokenize(engine, "x", 1, 0, ids, 8, NULL));

    char text[8] = "-------";
    EXPECT(BESPOKE_STATUS_BUFFER_TOO_SMALL, "5 are needed",
           bespoke_detokenize(engine, ids, 4, text, 4, &num));
    CHECK(num == 4 && text[0] == '-');
    OK(bespoke_detokenize(engine, ids, 4, text, 5, &num));
    CHECK(num == 4 && memcmp(text, "a\0\xc3\xa9\0-", 6) == 0);
    const uint32_t far_id = 1000000;
    ARGUMENT("1000000 is outside", bespoke_detokenize(engine, &far_id, 1, text, 8, &num));
    OK(bespoke_engine_close(engine));
}

static void test_sessions(const char *model_dir) {
    const BespokeEngine engine = open_on(model_dir, BESPOKE_BACKEND_NULL);
    BespokeParams params = ids_params(4);
    params.session = "s";
    params.session_flags = BESPOKE_SESSION_FLAGS_START;
    static Tokens first, second, again, busy, running_tokens, last;
    size_t len = 0;
    OK(bespoke_generate(engine, &params, on_event, &first));
    OK(bespoke_session_len(engine, "s", &len));
    CHECK(len == 7);
    params.session_flags = BESPOKE_SESSION_FLAGS_CONTINUE;
    OK(bespoke_generate(engine, &params, on_event, &second));
    OK(bespoke_session_len(engine, "s", &len));
    CHECK(len == 14);
    OK(bespoke_session_rewind(engine, "s", 7));
    OK(bespoke_generate(engine, &params, on_event, &again));
    CHECK(memcmp(&second, &again, sizeof again) == 0);
    CHECK(memcmp(first.ids, second.ids, sizeof(uint32_t) * 4) != 0);
    ARGUMENT("cannot be cut to 99", bespoke_session_rewind(engine, "s", 99));

    params.max_tokens = SIZE_MAX;
    BespokeRequest running = 0, refused = 0;
    OK(bespoke_start(engine, &params, &running));
    OK(bespoke_start(engine, &params, &refused));
    EXPECT(BESPOKE_STATUS_BUSY, "has a request running", read_all(refused, &busy));
    EXPECT(BESPOKE_STATUS_ENDED, "", read_all(refused, &busy));
    OK(bespoke_request_free(refused));
    EXPECT(BESPOKE_STATUS_BUSY, "cancel it first", bespoke_session_end(engine, "s"));
    EXPECT(BESPOKE_STATUS_BUSY, "has a request running", bespoke_session_rewind(engine, "s", 1));
    OK(bespoke_cancel(running));
    EXPECT(BESPOKE_STATUS_ENDED, "", read_all(running, &running_tokens));
    OK(bespoke_request_free(running));
    OK(bespoke_session_end(engine, "s"));
    ARGUMENT("no session s", bespoke_session_len(engine, "s", &len));
    ARGUMENT("session is null", bespoke_session_end(engine, NULL));
    params.session_flags = BESPOKE_SESSION_FLAGS_START | BESPOKE_SESSION_FLAGS_END;
    params.max_tokens = 1;
    OK(bespoke_generate(engine, &params, on_event, &last));
    ARGUMENT("no session s", bespoke_session_end(engine, "s"));
    OK(bespoke_engine_close(engine));
}

/* --- Cancels --- */

static void *cancel(void *user) {
    OK(bespoke_cancel(*(const BespokeRequest *)user));
    return NULL;
}

static void test_cancel(const char *model_dir) {
    BespokeEngine engine = open_on(model_dir, BESPOKE_BACKEND_NULL);
    const BespokeParams params = ids_params(SIZE_MAX);
    BespokeRequest request = 0;
    OK(bespoke_start(engine, &params, &request));
    BespokeEvent event = {.size = sizeof event};
    OK(bespoke_next(request, -1, &event));
    CHECK(event.num_ids == 1 && event.num_prompt_tokens == 3 && event.num_output_tokens == 1);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, cancel, &request) == 0);
    static Tokens rest, called, closed;
    EXPECT(BESPOKE_STATUS_ENDED, "", read_all(request, &rest));
    CHECK(rest.finish_reason == BESPOKE_FINISH_REASON_CANCELLED);
    CHECK(pthread_join(thread, NULL) == 0);
    OK(bespoke_request_free(request));

    called.cancel_at = 3;
    EXPECT(BESPOKE_STATUS_CANCELLED, "", bespoke_generate(engine, &params, on_event, &called));
    CHECK(called.num_events == 3 && called.finish_reason == BESPOKE_FINISH_REASON_NONE);

    closed.close = engine;
    OK(bespoke_generate(engine, &params, on_event, &closed));
    CHECK(closed.finish_reason == BESPOKE_FINISH_REASON_CANCELLED);

    /* Nobody reads, and nothing is waited for. */
    engine = open_on(model_dir, BESPOKE_BACKEND_NULL);
    OK(bespoke_start(engine, &params, &request));
    OK(bespoke_request_free(request));
    OK(bespoke_engine_close(engine));
}

/* --- Eight threads at once --- */

typedef struct Shared {
    const char *model_dir;
    BespokeEngine steady;
    Tokens expected;
    _Atomic uint64_t engines[3];
    _Atomic uint64_t requests[6];
    _Atomic unsigned next_seed;
} Shared;

static unsigned draw(unsigned *state, unsigned num) {
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state % num;
}

/* Whatever the others did meanwhile, a call gives one of these. */
static void tolerate(BespokeStatus status) {
    switch (status) {
    case BESPOKE_STATUS_OK:
    case BESPOKE_STATUS_TIMEOUT:
    case BESPOKE_STATUS_ENDED:
    case BESPOKE_STATUS_INVALID_HANDLE:
    case BESPOKE_STATUS_BUSY:
    case BESPOKE_STATUS_ENGINE_DEAD:
        return;
    default:
        CHECK(status == BESPOKE_STATUS_OK);
    }
}

/* One of everything, on handles that others close and free. */
static void meddle(Shared *shared, unsigned *state) {
    _Atomic uint64_t *engine = &shared->engines[draw(state, 3)];
    _Atomic uint64_t *request = &shared->requests[draw(state, 6)];
    const BespokeParams params = ids_params(1 + draw(state, 200));
    BespokeEvent event = {.size = sizeof event};
    BespokeEngineInfo info = {.size = sizeof info};
    BespokeRequest started = 0;
    size_t num = 0;
    switch (draw(state, 10)) {
    case 0:
        tolerate(bespoke_engine_close(atomic_load(engine)));
        break;
    case 1:
        tolerate(bespoke_engine_close(
            atomic_exchange(engine, open_on(shared->model_dir, BESPOKE_BACKEND_NULL))));
        break;
    case 2:
    case 3:
    case 4:
        tolerate(bespoke_start(atomic_load(engine), &params, &started));
        tolerate(bespoke_request_free(atomic_exchange(request, started)));
        break;
    case 5:
        tolerate(bespoke_cancel(atomic_load(request)));
        break;
    case 6:
        tolerate(bespoke_request_free(atomic_load(request)));
        break;
    case 7:
        tolerate(bespoke_engine_info(atomic_load(engine), &info));
        tolerate(bespoke_tokenize(atomic_load(engine), "abc", 3, 1, NULL, 0, &num));
        break;
    default:
        tolerate(bespoke_next(atomic_load(request), draw(state, 3), &event));
        CHECK(event.text_len == 0 || event.text[event.text_len] == '\0');
    }
}

static void *work(void *user) {
    Shared *shared = user;
    unsigned state = atomic_fetch_add(&shared->next_seed, 1) * 2654435761U + 1;
    const BespokeParams params = ids_params(50);
    Tokens *tokens = malloc(sizeof *tokens);
    CHECK(tokens != NULL);
    for (int round = 0; round < 30; round++) {
        for (int turn = 0; turn < 10; turn++) {
            meddle(shared, &state);
        }
        /* Nothing of it touches an engine that nobody closes. */
        memset(tokens, 0, sizeof *tokens);
        OK(bespoke_generate(shared->steady, &params, on_event, tokens));
        CHECK(memcmp(tokens, &shared->expected, sizeof *tokens) == 0);
    }
    free(tokens);
    return NULL;
}

static void test_threads(const char *model_dir) {
    static Shared shared;
    shared.model_dir = model_dir;
    shared.steady = open_on(model_dir, BESPOKE_BACKEND_NULL);
    const BespokeParams params = ids_params(50);
    OK(bespoke_generate(shared.steady, &params, on_event, &shared.expected));
    pthread_t threads[NUM_THREADS];
    for (int idx = 0; idx < NUM_THREADS; idx++) {
        CHECK(pthread_create(&threads[idx], NULL, work, &shared) == 0);
    }
    for (int idx = 0; idx < NUM_THREADS; idx++) {
        CHECK(pthread_join(threads[idx], NULL) == 0);
    }
    for (int idx = 0; idx < 3; idx++) {
        tolerate(bespoke_engine_close(shared.engines[idx]));
    }
    for (int idx = 0; idx < 6; idx++) {
        tolerate(bespoke_request_free(shared.requests[idx]));
    }
    OK(bespoke_engine_close(shared.steady));
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        void (*run)(const char *model_dir);
    } tests[] = {
        {"tokens", test_tokens},     {"misuse", test_misuse}, {"text", test_text},
        {"sessions", test_sessions}, {"cancel", test_cancel}, {"threads", test_threads},
    };
    CHECK(argc == 3);
    /* What hangs ends. */
    alarm(300);
    for (size_t idx = 0; idx < sizeof tests / sizeof tests[0]; idx++) {
        if (strcmp(argv[1], tests[idx].name) == 0) {
            tests[idx].run(argv[2]);
            return 0;
        }
    }
    fprintf(stderr, "no test %s\n", argv[1]);
    return 2;
}
