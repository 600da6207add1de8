// A conversation: a line from standard input, an answer. The engine keeps what was said, in a
// session, so that each turn computes the new message alone.
//
//     c++ -std=c++17 -I include examples/chat.cpp -L ../../target/release -lbespoke -o chat
//     LD_LIBRARY_PATH=../../target/release ./chat path/to/model
//
// A second argument, `reference`, runs a model that the library has no kernels for.
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <stdexcept>
#include <string>

#include "bespoke.h"

namespace {

void check(BespokeStatus status) {
    if (status < 0) {
        throw std::runtime_error(bespoke_last_error());
    }
}

class Engine {
  public:
    Engine(const char *model_dir, const BespokeEngineOptions &options) {
        check(bespoke_engine_open(model_dir, &options, &handle));
    }
    ~Engine() { bespoke_engine_close(handle); }
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;

    BespokeEngine handle = 0;
};

class Request {
  public:
    Request(const Engine &engine, const BespokeParams &params) {
        check(bespoke_start(engine.handle, &params, &handle));
    }
    ~Request() { bespoke_request_free(handle); }
    Request(const Request &) = delete;
    Request &operator=(const Request &) = delete;

    // The next piece of the answer; false after the last.
    bool next(std::string &piece) {
        BespokeEvent event{};
        event.size = sizeof event;
        const BespokeStatus status = bespoke_next(handle, -1, &event);
        check(status);
        if (status != BESPOKE_STATUS_OK) {
            return false;
        }
        piece.assign(event.text, event.text_len);
        return true;
    }

  private:
    BespokeRequest handle = 0;
};

// A message of the user as JSON.
std::string message(const std::string &text) {
    std::string json = R"([{"role": "user", "content": ")";
    for (const unsigned char c : text) {
        if (c == '"' || c == '\\') {
            json += '\\';
            json += static_cast<char>(c);
        } else if (c < 0x20) {
            char escape[7];
            std::snprintf(escape, sizeof escape, "\\u%04x", c);
            json += escape;
        } else {
            json += static_cast<char>(c);
        }
    }
    return json + "\"}]";
}

void chat(const Engine &engine) {
    std::uint32_t session_flags = BESPOKE_SESSION_FLAGS_START;
    std::string line;
    while (std::cout << "> " << std::flush, std::getline(std::cin, line)) {
        const std::string messages = message(line);
        BespokeParams params{};
        params.size = sizeof params;
        params.messages = messages.c_str();
        params.max_tokens = 64;
        params.session = "chat";
        params.session_flags = session_flags;
        Request request(engine, params);
        for (std::string piece; request.next(piece);) {
            std::cout << piece << std::flush;
        }
        std::cout << '\n';
        session_flags = BESPOKE_SESSION_FLAGS_CONTINUE;
    }
}

} // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::cerr << "usage: " << argv[0] << " MODEL_DIR [reference]\n";
        return 2;
    }
    try {
        BespokeEngineOptions options{};
        options.size = sizeof options;
        if (argc > 2 && std::string(argv[2]) == "reference") {
            options.backend = BESPOKE_BACKEND_REFERENCE;
        }
        chat(Engine(argv[1], options));
        return 0;
    } catch (const std::exception &error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
}
