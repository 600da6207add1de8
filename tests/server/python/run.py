#!/usr/bin/env python3
"""Tests the server from outside, as the programs of others use it.

    tests/server/python/run.py client     the official openai client, live, against SmolLM2
    tests/server/python/run.py openapi    schemathesis, against the served /openapi.json
    tests/server/python/run.py browser    the web chat and the dashboard, in a headless Chromium
    tests/server/python/run.py pictures   takes the README's pictures of both, in two minutes
    tests/server/python/run.py limits     measures start, hostile clients and drain, in minutes

All make a virtual environment below target/, start `bespoke serve` on free ports of 127.0.0.1,
and stop it. `client` and `browser` take names of tests (test_stop, test_stop.StopTest) to run those
alone. Without a Chromium `browser` is skipped, and fails if BESPOKE_REQUIRE_BROWSER is set.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import python_environment  # noqa: E402

VENV = ROOT / "target" / "server-python"
KEY = "schemathesis-key-5b2e8a91"

# A short context ends answers that nobody bounds.
OPENAPI_CONTEXT = 256


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suite", choices=["client", "openapi", "browser", "pictures", "limits"])
    parser.add_argument("names", nargs="*", help="tests of client or browser to run, default all")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/bespoke")
    parser.add_argument("--model", type=pathlib.Path, help="model folder, default SmolLM2 as int4")
    parser.add_argument("--max-examples", type=int, default=100, help="cases a route, for openapi")
    parser.add_argument("--workers", type=int, default=2, help="threads of schemathesis")
    parser.add_argument("--seed", type=int, help="of schemathesis, default another each time")
    return parser.parse_args()


def model_folder(chosen):
    """SmolLM2 in the model cache, as the quick start leaves it there."""
    if chosen is not None:
        return chosen.resolve()
    name = "smollm2-135m-awq-g64"
    folder = python_environment.model_folder(name)
    if folder is None:
        sys.exit(f"no model {name} in the cache; `cargo run --release -- quickstart` puts it there")
    return folder


def prepare(options):
    """What the suites learn from the environment."""
    os.environ["BESPOKE_BINARY"] = str(options.binary.resolve())
    os.environ["BESPOKE_MODEL_FOLDER"] = str(model_folder(options.model))
    # NOTE: a proxy of the environment would get what is meant for the server.
    os.environ["NO_PROXY"] = "127.0.0.1"


def run_client(options):
    """The suite of the openai client; 0 where all is well."""
    prepare(options)
    from openai_client import serving

    return run_suite("openai client", "openai_client", options.names, serving.stop_all)


def run_browser(options):
    """The suite of the pages; 0 where all is well, or where there is no browser."""
    prepare(options)
    from browser import pages

    missing = pages.missing_browser()
    if missing:
        print(f"skipped: {missing}")
        return 1 if os.environ.get("BESPOKE_REQUIRE_BROWSER") else 0
    return run_suite("browser", "browser", options.names, pages.stop_all)


def run_pictures(options):
    """Takes the pictures; 0 where nothing went wrong."""
    prepare(options)
    from browser import pages, screenshots

    try:
        screenshots.take()
    finally:
        problems = pages.stop_all()
    print(f"pictures: see {screenshots.FOLDER}")
    return 1 if problems else 0


def run_limits(options):
    """Measures; needs an otherwise idle machine."""
    import limits

    return limits.run(options.binary.resolve(), model_folder(options.model))


def run_suite(title, package, names, stop_all):
    """The tests of a package, or those named; `stop_all` ends servers and tells their problems."""
    loader = unittest.defaultTestLoader
    if names:
        tests = loader.loadTestsFromNames([f"{package}.{name}" for name in names])
    else:
        tests = loader.discover(str(HERE / package), top_level_dir=str(HERE))
    begin = time.monotonic()
    try:
        result = unittest.TextTestRunner(verbosity=1).run(tests)
    finally:
        problems = stop_all()
    for problem in problems:
        print(f"\n{problem}", file=sys.stderr)
    # A case with several failures is one.
    failed = {getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors}
    passed = result.testsRun - len(failed)
    seconds = time.monotonic() - begin
    print(f"{title}: {passed} of {result.testsRun} cases passed in {seconds:.0f} s")
    return 0 if result.wasSuccessful() and not problems else 1


def run_openapi(options):
    """Schemathesis in all phases, with valid and invalid data; its exit status."""
    from bespoke_server import Server

    with tempfile.TemporaryDirectory() as scratch:
        keys = pathlib.Path(scratch) / "keys"
        keys.write_text(f"tester:{KEY}\n")
        keys.chmod(0o600)
        server = Server(
            options.binary.resolve(), model_folder(options.model), "--backend", "null",
            "--served-model-name", "schemathesis", "--max-context", str(OPENAPI_CONTEXT),
            "--api-key-file", str(keys),
        )
        try:
            begin = time.monotonic()
            command = schemathesis_command(server, options)
            # NOTE: it looks for its hooks in the folder that it runs in.
            status = subprocess.run(command, check=False, cwd=HERE).returncode
            print(f"schemathesis: exit status {status} after {time.monotonic() - begin:.0f} s")
        finally:
            ended = server.stop()
        if ended != 0 or "panicked" in server.log_text():
            print(f"the server ended with {ended}; it wrote: {server.log_text()}", file=sys.stderr)
            status = status or 1
    return status


def schemathesis_command(server, options):
    """Every check and phase, NUL included; a case that fails does not end the run."""
    command = [
        VENV / "bin/schemathesis", "--config-file", HERE / "schemathesis.toml", "run",
        server.url + "/openapi.json", "--header", f"Authorization:Bearer {KEY}",
        "--max-examples", str(options.max_examples), "--workers", str(options.workers),
    ]
    if options.seed is not None:
        command += ["--seed", str(options.seed)]
    return command


def main():
    """Runs what the command line asks for."""
    options = arguments()
    python_environment.enter("server-python", "-r", HERE / "requirements.txt")
    # Whoever ends the run ends its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.path.insert(0, str(HERE))
    suites = {
        "client": run_client, "openapi": run_openapi, "browser": run_browser,
        "pictures": run_pictures, "limits": run_limits,
    }
    sys.exit(suites[options.suite](options))


main()
