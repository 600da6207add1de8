#ifndef BESPOKE_H
#define BESPOKE_H

/* Made from engine/c/src by cbindgen: `BESPOKE_UPDATE=1 cargo test -p bespoke-c header`. */

#include <stddef.h>
#include <stdint.h>

/*
 * Bespoke in C, C++ and whatever can call C.
 *
 * Engines and requests are numbers. A number is given out once: 0, a closed or freed one, or one of
 * the other kind gives BESPOKE_STATUS_INVALID_HANDLE. There is nothing else that is global: engines
 * know nothing of each other.
 *
 * Every function may be called from any thread at any time, also at once. None lets a panic out.
 * Negative statuses are errors, about which bespoke_last_error() has a text for the same thread.
 *
 * A pointer is null, where the function says so, or points to as many items as the function says,
 * which stay as they are until it returns. Texts are UTF-8 and end with a zero byte unless a length
 * stands beside them. Fill structs with zeros, which stand for the defaults, and set their size:
 * programs and libraries of different versions understand each other by it.
 *
 * Close engines before the library is unloaded; the end of the process needs nothing.
 */


/*
 The version of the interface that this header describes. It goes up when a program that was
 built for it would have to be built anew; new functions, and new fields at the end of structs,
 leave it alone.
 */
#define BESPOKE_ABI_VERSION 1

/*
 How a call went. Negative values are errors, which `bespoke_last_error` explains.
 */
enum BespokeStatus
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     Done.
     */
    BESPOKE_STATUS_OK = 0,
    /*
     Nothing came within the time; try again.
     */
    BESPOKE_STATUS_TIMEOUT = 1,
    /*
     The request has had its last event.
     */
    BESPOKE_STATUS_ENDED = 2,
    /*
     The callback asked for the end.
     */
    BESPOKE_STATUS_CANCELLED = 3,
    /*
     A null pointer, text that is no UTF-8, an unknown number, or a request that is impossible.
     */
    BESPOKE_STATUS_INVALID_ARGUMENT = -1,
    /*
     A handle that is 0, was closed or freed, is of the other kind, or was never given out.
     */
    BESPOKE_STATUS_INVALID_HANDLE = -2,
    /*
     What is needed is in use; it can be had later.
     */
    BESPOKE_STATUS_BUSY = -3,
    /*
     The model's files are missing, damaged or contradict each other.
     */
    BESPOKE_STATUS_MODEL = -4,
    /*
     This library cannot run the model, or does not know what is asked for.
     */
    BESPOKE_STATUS_UNSUPPORTED = -5,
    /*
     Not enough memory, threads or handles.
     */
    BESPOKE_STATUS_RESOURCES = -6,
    /*
     The operating system refused an operation on a file.
     */
    BESPOKE_STATUS_IO = -7,
    /*
     The engine has died; close it and open another one.
     */
    BESPOKE_STATUS_ENGINE_DEAD = -8,
    /*
     The answer could not go on.
     */
    BESPOKE_STATUS_GENERATION_FAILED = -9,
    /*
     The caller's buffer is too small; the needed size was written.
     */
    BESPOKE_STATUS_BUFFER_TOO_SMALL = -10,
    /*
     A bug of the library. The call was given up; other handles are not affected.
     */
    BESPOKE_STATUS_PANIC = -11,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum BespokeStatus BespokeStatus;
#else
typedef int32_t BespokeStatus;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Where a model runs.
 */
enum BespokeBackend
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     The fastest one that the library has kernels for.
     */
    BESPOKE_BACKEND_AUTO = 0,
    /*
     Kernels generated for the model's shapes, on the CPU.
     */
    BESPOKE_BACKEND_CPU = 1,
    /*
     Plain loops in float32: any model, slowly.
     */
    BESPOKE_BACKEND_REFERENCE = 2,
    /*
     Kernels generated for the model's shapes, on an NVIDIA GPU.
     */
    BESPOKE_BACKEND_CUDA = 3,
    /*
     Hashes instead of a model's mathematics, to test programs with; reads no weights.
     */
    BESPOKE_BACKEND_NULL = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum BespokeBackend BespokeBackend;
#else
typedef int32_t BespokeBackend;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Element type of the KV cache. The reference backend keeps float32 whatever this says.
 */
enum BespokeKvType
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     float16
     */
    BESPOKE_KV_TYPE_DEFAULT = 0,
    BESPOKE_KV_TYPE_F16 = 1,
    BESPOKE_KV_TYPE_F32 = 2,
    BESPOKE_KV_TYPE_INT8 = 3,
    BESPOKE_KV_TYPE_INT4 = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum BespokeKvType BespokeKvType;
#else
typedef int32_t BespokeKvType;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 What weights are multiplied with.
 */
enum BespokeActivations
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     int8
     */
    BESPOKE_ACTIVATIONS_DEFAULT = 0,
    /*
     float32 as they are
     */
    BESPOKE_ACTIVATIONS_FLOAT = 1,
    /*
     Rounded to 8 bits, with a scale per row and group; for 4-bit weights, others ignore it.
     */
    BESPOKE_ACTIVATIONS_INT8 = 2,
    /*
     Rounded to bfloat16; for models whose weights are all bfloat16, on the CPU.
     */
    BESPOKE_ACTIVATIONS_BF16 = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum BespokeActivations BespokeActivations;
#else
typedef int32_t BespokeActivations;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 Why an answer ended.
 */
enum BespokeFinishReason
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     It has not ended.
     */
    BESPOKE_FINISH_REASON_NONE = 0,
    /*
     An end token, a stop token or a stop string.
     */
    BESPOKE_FINISH_REASON_STOP = 1,
    /*
     `max_tokens`, or the end of the context.
     */
    BESPOKE_FINISH_REASON_LENGTH = 2,
    /*
     It was cancelled, or its engine was closed.
     */
    BESPOKE_FINISH_REASON_CANCELLED = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum BespokeFinishReason BespokeFinishReason;
#else
typedef int32_t BespokeFinishReason;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 How a request takes part in a session; to be added up.
 */
enum BespokeSessionFlags
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /*
     Goes on behind what the session has.
     */
    BESPOKE_SESSION_FLAGS_CONTINUE = 0,
    /*
     Starts the session anew; an older one of this name is dropped.
     */
    BESPOKE_SESSION_FLAGS_START = 1,
    /*
     Ends the session with this request.
     */
    BESPOKE_SESSION_FLAGS_END = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum BespokeSessionFlags BespokeSessionFlags;
#else
typedef uint32_t BespokeSessionFlags;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/*
 How an engine is set up. Zeros are the defaults.
 */
typedef struct BespokeEngineOptions {
    /*
     sizeof(BespokeEngineOptions)
     */
    size_t size;
    /*
     A `BespokeBackend`.
     */
    int32_t backend;
    /*
     A `BespokeKvType`.
     */
    int32_t kv_type;
    /*
     A `BespokeActivations`.
     */
    int32_t activations;
    /*
     Threads to compute with, 1024 at most; 0 for one on each core.
     */
    uint32_t num_threads;
    /*
     Tokens of prompt and answer together; 0 for as many as the model was trained for, as far as
     a KV cache of 2 GiB holds them.
     */
    size_t max_context;
    /*
     Requests that run at once, 4096 at most, others wait; 0 for 64.
     */
    size_t max_sequences;
    /*
     Sessions that are kept at once, 65536 at most; 0 for 256.
     */
    size_t max_sessions;
} BespokeEngineOptions;

/*
 An engine: a model, loaded, and the requests it serves. 0 is none.
 */
typedef uint64_t BespokeEngine;

/*
 What is told of an engine.
 */
typedef struct BespokeEngineInfo {
    /*
     sizeof(BespokeEngineInfo)
     */
    size_t size;
    /*
     Tokens that the model knows; every token id is below.
     */
    size_t vocab_size;
    /*
     Tokens of prompt and answer together.
     */
    size_t max_context;
    /*
     Memory of the weights, in bytes.
     */
    size_t weights_bytes;
    /*
     Memory of the KV cache, in bytes.
     */
    size_t kv_cache_bytes;
    /*
     The `BespokeBackend` that was chosen.
     */
    int32_t backend;
    /*
     Whether the model reads and writes text; else it takes and gives token ids alone.
     */
    int32_t has_tokenizer;
    /*
     Whether the model takes chat messages.
     */
    int32_t has_chat_template;
    int32_t reserved;
} BespokeEngineInfo;

/*
 What is asked of an engine: one of `prompt`, `messages` and `prompt_ids`, and how to go on from
 it. Zeros are the defaults, which take the likeliest token each time. The library keeps nothing
 of it once the function has returned.
 */
typedef struct BespokeParams {
    /*
     sizeof(BespokeParams)
     */
    size_t size;
    /*
     Text to continue as it is, 64 MiB at most.
     */
    const char *prompt;
    /*
     A JSON array of chat messages, `[{"role": "user", "content": "Hello"}]`, for the model's
     chat template. With a session that goes on, the new messages alone.
     */
    const char *messages;
    /*
     Token ids to continue.
     */
    const uint32_t *prompt_ids;
    size_t num_prompt_ids;
    /*
     Tokens to generate at most; 0 for 256.
     */
    size_t max_tokens;
    /*
     Divides the logits; 0 takes the likeliest token.
     */
    float temperature;
    /*
     Keeps the likeliest tokens up to this share of the probability; 0 for all.
     */
    float top_p;
    /*
     Keeps tokens with at least this share of the likeliest one's probability.
     */
    float min_p;
    /*
     Divides the logits of tokens that were there, above 0; 0 for 1, which changes nothing.
     */
    float repetition_penalty;
    /*
     Taken from the logits of tokens in the answer, -2 to 2.
     */
    float presence_penalty;
    /*
     Taken from the logits of tokens in the answer each time they are there, -2 to 2.
     */
    float frequency_penalty;
    /*
     Keeps this many of the likeliest tokens; 0 for all.
     */
    size_t top_k;
    /*
     Start of the random numbers: equal ones give equal answers.
     */
    uint64_t seed;
    /*
     Texts that end the answer and are no part of it, 16 at most, of 1024 bytes at most.
     */
    const char *const *stop_strings;
    size_t num_stop_strings;
    /*
     Tokens that end the answer besides the model's own, 1024 at most.
     */
    const uint32_t *stop_ids;
    size_t num_stop_ids;
    /*
     The session that the request belongs to; null for none. 1 to 64 letters, digits, '-', '_'
     and '.', the first one no '.'.
     */
    const char *session;
    /*
     Of `BespokeSessionFlags`.
     */
    uint32_t session_flags;
    /*
     Whether the model's end tokens do not end the answer.
     */
    int32_t ignore_eos;
} BespokeParams;

/*
 News of a request: what was generated, and in the last event how it ended.
 */
typedef struct BespokeEvent {
    /*
     sizeof(BespokeEvent)
     */
    size_t size;
    /*
     The text that became certain, as UTF-8, in whole characters and without stop strings. A zero
     byte stands behind it. Empty while characters are incomplete, and without a tokenizer.
     */
    const char *text;
    /*
     Bytes of the text.
     */
    size_t text_len;
    /*
     The tokens that were generated. The last one may be the end token, which has no text.
     */
    const uint32_t *ids;
    size_t num_ids;
    /*
     Tokens of the request's prompt, without those of a session's history.
     */
    size_t num_prompt_tokens;
    /*
     Tokens of history and prompt that were found in the KV cache.
     */
    size_t num_cached_tokens;
    /*
     Tokens generated so far.
     */
    size_t num_output_tokens;
    /*
     A `BespokeFinishReason`: other than `BESPOKE_FINISH_REASON_NONE` in the last event.
     */
    int32_t finish_reason;
    int32_t reserved;
} BespokeEvent;

/*
 Takes the events of `bespoke_generate`, on the thread that called it. What the event points to
 is valid until the callback returns. It may call any function of the library, and has to return:
 no exception and no longjmp may leave it. Anything but 0 cancels the request.
 */
typedef int32_t (*BespokeCallback)(void *user, const struct BespokeEvent *event);

/*
 A request that was started. 0 is none.
 */
typedef uint64_t BespokeRequest;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 What went wrong in the calling thread's last call that failed, as UTF-8: the value that is at
 fault and what to do; empty where none has failed. The text is valid until the thread's next
 call of this library, and never null.
 */
const char *bespoke_last_error(void);

/*
 Loads a model and starts an engine for it, on a thread of its own.

 `model_dir` is a folder as the Hugging Face Hub has them, `options` may be null. Returns when
 the model is loaded, and writes the engine to `engine`, or 0 where it fails.
 */
BespokeStatus bespoke_engine_open(const char *model_dir,
                                  const struct BespokeEngineOptions *options,
                                  BespokeEngine *engine);

/*
 Cancels the engine's requests, ends its thread, waits for that as long as a step takes, and
 frees the model. The handles of its requests stay until they are freed, and give what was
 generated before.
 */
BespokeStatus bespoke_engine_close(BespokeEngine engine);

/*
 Describes an engine. `info->size` has to be set.
 */
BespokeStatus bespoke_engine_info(BespokeEngine engine, struct BespokeEngineInfo *info);

/*
 Runs a request to its end and gives its events to `callback`, on the calling thread, with `user`
 as it is. Other requests of the engine run meanwhile.

 `BESPOKE_STATUS_OK` after the last event; `BESPOKE_STATUS_CANCELLED` where the callback asked
 for the end, after which it is not called again.
 */
BespokeStatus bespoke_generate(BespokeEngine engine,
                               const struct BespokeParams *params,
                               BespokeCallback callback,
                               void *user);

/*
 Starts a request and returns at once; its events are for `bespoke_next`. Writes the request to
 `request`, or 0 where it fails. It has to be freed.
 */
BespokeStatus bespoke_start(BespokeEngine engine,
                            const struct BespokeParams *params,
                            BespokeRequest *request);

/*
 Waits `timeout_ms` milliseconds for the next event and writes it to `event`, whose size has to
 be set; 0 does not wait, a negative number waits as long as it takes.

 What the event points to is valid until the same thread's next call of this function.
 `BESPOKE_STATUS_TIMEOUT` where no event came; `BESPOKE_STATUS_ENDED` after the last event, and
 after an error of the request; `BESPOKE_STATUS_BUSY` while another thread waits for the same
 request's events.
 */
BespokeStatus bespoke_next(BespokeRequest request, int64_t timeout_ms, struct BespokeEvent *event);

/*
 Ends a request early, from any thread; does nothing to one that has ended. What was generated
 before, and a last event, still come.
 */
BespokeStatus bespoke_cancel(BespokeRequest request);

/*
 Frees a request, and cancels it where it has not ended. A thread that waits for its events gets
 the last one.
 */
BespokeStatus bespoke_request_free(BespokeRequest request);

/*
 Ends a session. A request that runs on it has to be cancelled first, and to have had its last
 event.
 */
BespokeStatus bespoke_session_end(BespokeEngine engine, const char *session);

/*
 Writes the tokens that a session has, prompts and answers, to `num_tokens`. While a request runs
 on it, they are those before.
 */
BespokeStatus bespoke_session_len(BespokeEngine engine, const char *session, size_t *num_tokens);

/*
 Cuts a session that no request runs on to its first `num_tokens` tokens.
 */
BespokeStatus bespoke_session_rewind(BespokeEngine engine, const char *session, size_t num_tokens);

/*
 The name of a status, such as "busy"; "unknown" for a number that is none.
 */
const char *bespoke_status_name(int32_t status);

/*
 The token ids of `text_len` bytes of UTF-8, 64 MiB at most.

 `add_special` adds the tokens that the model has around a text, such as one at its beginning.
 Writes their number to `num_ids`, and the ids to `ids` where there is room for all of them,
 `ids_max`; `ids` may be null to ask for the number alone.
 */
BespokeStatus bespoke_tokenize(BespokeEngine engine,
                               const char *text,
                               size_t text_len,
                               int32_t add_special,
                               uint32_t *ids,
                               size_t ids_max,
                               size_t *num_ids);

/*
 The text of tokens, without special ones, as UTF-8.

 Writes its bytes to `text_len`, and the text with a zero byte behind it to `text` where there is
 room for both, `text_max`; `text` may be null to ask for the length alone.
 */
BespokeStatus bespoke_detokenize(BespokeEngine engine,
                                 const uint32_t *ids,
                                 size_t num_ids,
                                 char *text,
                                 size_t text_max,
                                 size_t *text_len);

/*
 The version of the interface that the library has: compare it with `BESPOKE_ABI_VERSION`.
 */
uint32_t bespoke_abi_version(void);

/*
 The version of the library, such as "0.1.0".
 */
const char *bespoke_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* BESPOKE_H */
