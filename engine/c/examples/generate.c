/*
 * Continues a text, and prints the answer while it is generated.
 *
 *     cc -std=c11 -I include examples/generate.c -L ../../target/release -lbespoke -o generate
 *     LD_LIBRARY_PATH=../../target/release ./generate path/to/model "Once upon a time"
 *
 * A third argument, `reference`, runs a model that the library has no kernels for.
 */
#include <stdio.h>
#include <string.h>

#include "bespoke.h"

static int32_t print_event(void *user, const BespokeEvent *event) {
    (void)user;
    fwrite(event->text, 1, event->text_len, stdout);
    fflush(stdout);
    if (event->finish_reason != BESPOKE_FINISH_REASON_NONE) {
        fprintf(stderr, "\n[%zu prompt tokens, %zu generated]\n", event->num_prompt_tokens,
                event->num_output_tokens);
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL_DIR PROMPT [reference]\n", argv[0]);
        return 2;
    }
    BespokeEngineOptions options = {.size = sizeof options, .max_sequences = 1};
    if (argc > 3 && strcmp(argv[3], "reference") == 0) {
        options.backend = BESPOKE_BACKEND_REFERENCE;
    }
    BespokeEngine engine;
    BespokeStatus status = bespoke_engine_open(argv[1], &options, &engine);
    if (status == BESPOKE_STATUS_OK) {
        BespokeParams params = {.size = sizeof params, .prompt = argv[2], .max_tokens = 64};
        status = bespoke_generate(engine, &params, print_event, NULL);
    }
    if (status != BESPOKE_STATUS_OK) {
        fprintf(stderr, "error: %s\n", bespoke_last_error());
    }
    bespoke_engine_close(engine);
    return status == BESPOKE_STATUS_OK ? 0 : 1;
}
