"""Continues a text, with nothing but Python's ctypes.

    python3 generate.py target/release/libbespoke.so path/to/model "Once upon a time"

A fourth argument, `reference`, runs a model that the library has no kernels for.
"""

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p


class Options(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("backend", c_int32),
        ("kv_type", c_int32),
        ("activations", c_int32),
        ("num_threads", c_uint32),
        ("max_context", c_size_t),
        ("max_sequences", c_size_t),
        ("max_sessions", c_size_t),
    ]


class Params(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("prompt", c_char_p),
        ("messages", c_char_p),
        ("prompt_ids", POINTER(c_uint32)),
        ("num_prompt_ids", c_size_t),
        ("max_tokens", c_size_t),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("top_k", c_size_t),
        ("seed", c_uint64),
        ("stop_strings", POINTER(c_char_p)),
        ("num_stop_strings", c_size_t),
        ("stop_ids", POINTER(c_uint32)),
        ("num_stop_ids", c_size_t),
        ("session", c_char_p),
        ("session_flags", c_uint32),
        ("ignore_eos", c_int32),
    ]


class Event(ctypes.Structure):
    _fields_ = [
        ("size", c_size_t),
        ("text", c_void_p),
        ("text_len", c_size_t),
        ("ids", POINTER(c_uint32)),
        ("num_ids", c_size_t),
        ("num_prompt_tokens", c_size_t),
        ("num_cached_tokens", c_size_t),
        ("num_output_tokens", c_size_t),
        ("finish_reason", c_int32),
        ("reserved", c_int32),
    ]


Callback = ctypes.CFUNCTYPE(c_int32, c_void_p, POINTER(Event))
BACKEND_REFERENCE = 2


def load(path):
    library = ctypes.CDLL(path)
    library.bespoke_last_error.restype = c_char_p
    library.bespoke_engine_open.argtypes = [c_char_p, POINTER(Options), POINTER(c_uint64)]
    library.bespoke_engine_close.argtypes = [c_uint64]
    library.bespoke_generate.argtypes = [c_uint64, POINTER(Params), Callback, c_void_p]
    return library


def main(library_path, model_dir, prompt, backend="auto"):
    bespoke = load(library_path)

    def check(status):
        if status < 0:
            raise RuntimeError(bespoke.bespoke_last_error().decode())

    def on_event(_user, event):
        text = ctypes.string_at(event.contents.text, event.contents.text_len)
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        return 0

    options = Options(size=ctypes.sizeof(Options))
    if backend == "reference":
        options.backend = BACKEND_REFERENCE
    engine = c_uint64()
    check(bespoke.bespoke_engine_open(model_dir.encode(), byref(options), byref(engine)))
    try:
        params = Params(size=ctypes.sizeof(Params), prompt=prompt.encode(), max_tokens=64)
        check(bespoke.bespoke_generate(engine, byref(params), Callback(on_event), None))
    finally:
        bespoke.bespoke_engine_close(engine)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
