#!/usr/bin/env python3
"""One model by Bespoke, llama.cpp and ik_llama.cpp on this CPU, in turn.

    benches/peers/compare.py MODEL                    a model folder or the name of a cached model
    benches/peers/compare.py MODEL --cases decode,prompt --rounds 11

The first run compiles the peers. MODEL has 4-bit linears; its weights go to the peers as they are
(Q4_1: the minimum of a group in float16) and as Q4_0, their fastest format, made from those; heads
have 8 bits in all programs. Every round runs each program once at each case. The table has medians
over rounds, and the median over rounds of the ratio to the fastest peer.
"""

import argparse
import datetime
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import programs  # noqa: E402
import python_environment  # noqa: E402

PROMPT, ANSWER = 128, 128
CLIENTS, REQUESTS = 16, 64
START_TEXT = "The first thing to know about the sea is"


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/bespoke")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--served-rounds", type=int, default=3)
    parser.add_argument("--mistral-rs", action="store_true", help="once, too; it takes minutes")
    parser.add_argument("--cores", default="0,1", help="all programs run on these")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="folder of the results")
    options = parser.parse_args()
    options.cores = {int(core) for core in options.cores.split(",")}
    options.cases = options.cases.split(",")
    options.binary = options.binary.resolve()
    return options


def text_of(command):
    """What a command prints."""
    command = [str(word) for word in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout.decode()


def start(command):
    """Seconds that a whole command takes, and the most megabytes it had in memory. It runs once
    before, so that the system has the files in memory."""
    run_once(command)
    return run_once(command)


def run_once(command):
    """See start."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{command[0]} failed with {process.returncode}")
    return {"s": time.monotonic() - begin, "mb": usage.ru_maxrss / 1024}


class Bespoke:
    """Our side. Rates are tokens per second."""

    name = "Bespoke"
    cases = ["decode", "prompt", "batch8", "batch32", "served", "start"]

    def __init__(self, options):
        self.binary, self.model = options.binary, options.model
        self.threads = len(options.cores)

    def bench(self, *args):
        """The last point of a measurement."""
        return json.loads(text_of([
            self.binary, "bench", "--model", self.model, "--threads", self.threads, "--json", *args,
        ]))

    def latency(self, concurrency, prompt, answer, rounds):
        """A static batch, with the times of kernels."""
        point = self.bench(
            "--concurrency", concurrency, "--prompt-tokens", prompt, "--max-tokens", answer,
            "--rounds", rounds, "--kernels",
        )
        return point | {"kernels": point["points"][-1]["kernels"]}

    def decode(self):
        point = self.latency(1, 1, 128, 2)
        rate = point["decode_tokens_per_s"]
        return {"rate": rate, "share": rate * limit_of_step(point, "memory")}

    def prompt(self):
        point = self.latency(1, 512, 1, 3)
        rate = point["prompt_tokens_per_s"]
        return {"rate": rate, "share": rate / 512 * limit_of_step(point, "int8 dot")}

    def batch(self, size):
        return {"rate": self.latency(size, 128, 64, 1)["decode_tokens_per_s"]}

    def start(self):
        return start([
            self.binary, "generate", "--model", self.model, "--threads", self.threads,
            "--prompt", START_TEXT, "--max-tokens", 1,
        ])

    def server(self, port):
        return [
            self.binary, "serve", "--model", self.model, "--threads", self.threads,
            "--host", "127.0.0.1", "--port", port,
        ]

    ready = "/ready"


def limit_of_step(point, bound):
    """Seconds of a step that the machine's limit `bound` needs for what must move or be computed:
    of the steps whose kernels were timed, each of which has one call of `embed`."""
    num_steps = sum(kernel["calls"] for kernel in point["kernels"] if kernel["op"] == "embed")
    limits = [k["limit_seconds"] for k in point["kernels"] if k["bound"] == bound]
    return sum(limits) / num_steps


class Peer:
    """llama.cpp's tools, or ik_llama.cpp's, on one file."""

    def __init__(self, options, peer, paths, file, label):
        self.name = f"{peer} {label}"
        self.paths, self.file = paths, file
        self.threads = str(len(options.cores))
        self.cases = ["decode", "prompt"]
        if peer == "llama.cpp":
            self.cases += ["batch8", "batch32", "served", "start"]

    def llama_bench(self, *args):
        """The best of with and without flash attention."""
        text = text_of([
            self.paths("llama-bench"), "-m", self.file, "-t", self.threads, "-fa", "0,1",
            "-o", "json", *args,
        ])
        return {"rate": max(run["avg_ts"] for run in json.loads(text[text.index("["):]))}

    def decode(self):
        return self.llama_bench("-p", 0, "-n", 128, "-r", 2)

    def prompt(self):
        return self.llama_bench("-p", 512, "-n", 0, "-r", 3)

    def batch(self, size):
        text = text_of([
            self.paths("llama-batched-bench"), "-m", self.file, "-t", self.threads,
            "-tb", self.threads, "-c", size * 256, "-npp", 128, "-ntg", 64, "-npl", size,
            "--output-format", "jsonl",
        ])
        rates = [json.loads(line)["speed_tg"] for line in text.splitlines() if line[:1] == "{"]
        return {"rate": rates[-1]}

    def start(self):
        return start([
            self.paths("llama-completion"), "-m", self.file, "-t", self.threads, "-n", 1,
            "-p", START_TEXT, "-no-cnv", "--no-warmup", "-c", 512,
        ])

    def server(self, port):
        return [
            self.paths("llama-server"), "-m", self.file, "-t", self.threads, "-tb", self.threads,
            "--host", "127.0.0.1", "--port", port, "-np", CLIENTS,
            "-c", CLIENTS * (PROMPT + ANSWER + 32), "--no-webui",
        ]

    ready = "/health"


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def served(side, ours):
    """Requests per second of 16 clients, and the 95th percentile of first tokens."""
    port = free_port()
    server = subprocess.Popen(
        [str(word) for word in side.server(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                with urllib.request.urlopen(url + side.ready, timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.1)
        report = json.loads(text_of([
            ours.binary, "bench", "--mode", "serving", "--url", url, "--concurrency", CLIENTS,
            "--requests", REQUESTS, "--prompt-tokens", PROMPT, "--max-tokens", ANSWER,
            "--vocab-size", 49152, "--json",
        ]))
        point = report["points"][-1]
        return {"rate": point["requests_per_s"], "first_p95_ms": point["ttft_ms"]["p95"]}
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


# What a case is called in the table.
CASES = {
    "decode": "1 sequence, 128 tokens, tokens/s",
    "prompt": "prompt of 512, tokens/s",
    "batch8": "8 at once (128 and 64 tokens), decoded tokens/s",
    "batch32": "32 at once (128 and 64 tokens), decoded tokens/s",
    "served": f"served, {CLIENTS} clients, {PROMPT} and {ANSWER} tokens, requests/s",
    "start": "exec to the end of one token",
}


def measure(case, side, ours):
    """One value of a case."""
    if case.startswith("batch"):
        return side.batch(int(case.removeprefix("batch")))
    return served(side, ours) if case == "served" else getattr(side, case)()


def quantized(paths, source, output, kind, head):
    """A file of weights `kind`, with 8 bits for embedding and head, of an exported one."""
    if not output.exists():
        scratch = output.with_suffix(".part")
        text_of([
            paths("llama-quantize"), "--allow-requantize", "--token-embedding-type", head,
            "--output-tensor-type", head, source, scratch, kind, 2,
        ])
        scratch.rename(output)
    return output


def sides(options, scratch):
    """All programs with all formats, ours first."""
    llama, ik = (programs.install(peer) for peer in programs.SOURCES)
    exact = scratch / "q4_1.gguf"
    text_of([
        options.binary, "export", "gguf", options.model, "-o", exact, "--head", "q8_0",
        "--overwrite",
    ])
    q4_0 = quantized(llama, exact, scratch / "q4_0.gguf", "Q4_0", "q8_0")
    q4_0_r8 = quantized(ik, exact, scratch / "q4_0_r8.gguf", "Q4_0_R8", "q8_0")
    return [
        Bespoke(options),
        Peer(options, "llama.cpp", llama, q4_0, "Q4_0"),
        Peer(options, "llama.cpp", llama, exact, "Q4_1"),
        Peer(options, "ik_llama.cpp", ik, q4_0_r8, "Q4_0_R8"),
        Peer(options, "ik_llama.cpp", ik, exact, "Q4_1"),
    ]


def run_rounds(options, all_sides):
    """Values by case and side, a list over rounds."""
    values = {case: {} for case in options.cases}
    ours = all_sides[0]
    for idx in range(options.rounds):
        for case in options.cases:
            if case == "served" and idx >= options.served_rounds:
                continue
            for side in all_sides:
                if case in side.cases:
                    value = measure(case, side, ours)
                    values[case].setdefault(side.name, []).append(value)
                    shown = ", ".join(f"{key} {one:.4g}" for key, one in value.items())
                    print(f"{idx + 1} {case:8} {side.name:22} {shown}", file=sys.stderr)
    return values


def mistral_rs(file):
    """Its rates as it tells them."""
    text = text_of([sys.executable, HERE / "mistral_rs.py", file])
    return json.loads(text.splitlines()[-1])


def medians(rounds, key):
    """Of a value over rounds."""
    return statistics.median(value[key] for value in rounds)


def ratio(of_case, key, more_is_better=True):
    """The median over rounds of our value and the best peer's."""
    names = list(of_case)
    best = max if more_is_better else min
    per_round = zip(*(of_case[name] for name in names))
    ratios = []
    for ours, *peers in per_round:
        peer = best(value[key] for value in peers)
        ratios.append(ours[key] / peer if more_is_better else peer / ours[key])
    return statistics.median(ratios)


def rows(values):
    """Lines of the table: what, key, whether more is better."""
    for case, of_case in values.items():
        if case == "start":
            yield "exec to the end of one token, files in memory, s", of_case, "s", False
            yield "the same, peak memory, MB", of_case, "mb", False
        else:
            yield CASES[case], of_case, "rate", True
        if case == "served":
            yield "first token, 95th percentile, ms", of_case, "first_p95_ms", False


def table(values, all_sides):
    """Markdown."""
    names = [side.name for side in all_sides]
    lines = ["| case | " + " | ".join(names) + " | times the best peer |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for what, of_case, key, more_is_better in rows(values):
        cells = []
        for name in names:
            digits = 3 if key == "s" or "requests" in what else 1
            cells.append(f"{medians(of_case[name], key):.{digits}f}" if name in of_case else "")
        cells.append(f"**{ratio(of_case, key, more_is_better):.2f}**")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for case, what in [("decode", "memory bandwidth"), ("prompt", "int8 dot rate")]:
        if case in values:
            share = medians(values[case]["Bespoke"], "share")
            lines.append(f"\nBespoke, {case}: {share:.1%} of the {what} measured in the same run.")
    return "\n".join(lines) + "\n"


def main():
    options = arguments()
    python_environment.enter("peers-python", *programs.REQUIREMENTS)
    os.sched_setaffinity(0, options.cores)
    name = pathlib.Path(options.model).name
    scratch = programs.FOLDER / "models" / name
    scratch.mkdir(parents=True, exist_ok=True)
    all_sides = sides(options, scratch)
    values = run_rounds(options, all_sides)
    text = table(values, all_sides)
    if options.mistral_rs:
        rates = values["mistral.rs"] = mistral_rs(scratch / "q4_1.gguf")
        text += (
            f"\nmistral.rs on the Q4_1 file, once: {rates['decode']:.1f} decoded tokens/s, "
            f"{rates['prompt']:.1f} of a prompt of 512 words.\n"
        )
    print(text, end="")
    folder = options.output or ROOT / f"benches/runs/{datetime.date.today()}-peers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
