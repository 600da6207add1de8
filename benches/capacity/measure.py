#!/usr/bin/env python3
"""How many workers a load needs, from measurements of one.

    benches/capacity/measure.py MODEL -o FOLDER [--threads 1] [--binary target/release/bespoke]

Serves MODEL with so many threads, on cores of its own, and measures what it ends per second at
several numbers of requests at once and lengths; fits model.py to the points; then measures two such
workers at once beside what the model says of them. FOLDER gets capacity.json (points, numbers, the
check) and capacity.html, the calculator with the measured curves. Takes some five minutes.
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess

import model

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS = [1, 2, 4, 8, 16, 32, 64]
LENGTHS = [(32, 64), (128, 64), (384, 32)]
START_SECONDS = 300
# NOTE: prompts that were seen before would be found in the KV cache.
SEEDS = itertools.count(1)
# Of a check: requests at once at each worker, prompt and generated tokens; none of them was fitted.
CHECKS = [(6, 200, 48), (12, 96, 96), (24, 160, 64)]


class Server:
    """One worker, on the cores `cores`."""

    def __init__(self, args, cores):
        command = ["taskset", "-c", cores, args.binary, "serve", "--model", args.model]
        command += ["--threads", str(args.threads), "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            found = re.match(r"listening on (http://\S+)", line)
            if found:
                self.url = found.group(1)
                break
        else:
            raise SystemExit(f"the server ended with {self.process.wait()}")
        # NOTE: what it logs has to be read, or it would wait.
        self.log = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(START_SECONDS)
        self.log.wait()


def bench(args, url, rows, p, g, requests):
    """A client of `url`, already running."""
    command = [args.binary, "bench", "--mode", "serving", "--url", url, "--json"]
    command += ["--concurrency", str(rows), "--requests", str(requests)]
    command += ["--prompt-tokens", str(p), "--max-tokens", str(g), "--seed", str(next(SEEDS))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def result(client):
    out, _ = client.communicate()
    if client.returncode != 0:
        raise SystemExit(f"bench ended with {client.returncode}")
    (point,) = json.loads(out)["points"]
    if point["failed_requests"]:
        raise SystemExit(f"{point['failed_requests']} requests failed: {point['failures']}")
    return point


def num_requests(rows):
    """Enough that begin and end of a run, with fewer requests at once, weigh little."""
    return max(8, 5 * rows)


def measure(args, cores):
    points = []
    with Server(args, cores) as server:
        result(bench(args, server.url, 4, 64, 16, 16))
        for p, g in LENGTHS:
            for rows in ROWS:
                found = [
                    result(bench(args, server.url, rows, p, g, num_requests(rows)))
                    for _ in range(args.rounds)
                ]
                rate = statistics.median(one["requests_per_s"] for one in found)
                point = dict(rows=rows, prompt=p, generated=g, rate=rate)
                point["first_token_p95"] = statistics.median(
                    one["ttft_ms"]["p95"] / 1e3 for one in found
                )
                points.append(point)
                print(f"{rows:3} at once, {p:3} + {g:3} tokens: {point['rate']:8.3f} requests/s")
    return points


def check(args, worker, cores):
    """Two workers at once, beside what the model says."""
    checks = []
    with Server(args, cores[0]) as first, Server(args, cores[1]) as second:
        for server in (first, second):
            result(bench(args, server.url, 4, 64, 16, 16))
        for rows, p, g in CHECKS:
            rates = []
            for _ in range(args.rounds):
                clients = [
                    bench(args, server.url, rows, p, g, num_requests(rows))
                    for server in (first, second)
                ]
                rates.append(sum(result(client)["requests_per_s"] for client in clients))
            measured, said = statistics.median(rates), 2 * worker.rate(rows, p, g)
            ratio = said / measured
            checks.append(dict(rows=rows, prompt=p, generated=g, measured=measured, said=said))
            print(
                f"two workers, {rows} at once each, {p} + {g} tokens: {measured:.3f} requests/s, "
                f"predicted {said:.3f}, {100 * (ratio - 1):+.1f} %"
            )
    return checks


def write(args, folder, points, worker, checks):
    data = dict(
        model=pathlib.Path(args.model).name,
        threads=args.threads,
        points=points,
        step=worker.step,
        context=worker.context,
        prompt=worker.prompt,
        checks=checks,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "capacity.json").write_text(json.dumps(data, indent=1) + "\n")
    page = (HERE / "page.html").read_text()
    # NOTE: a name with `</script>` would end the script.
    text = json.dumps(data).replace("<", "\\u003c")
    (folder / "capacity.html").write_text(page.replace("/*DATA*/ null", text))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--binary", default=str(ROOT / "target/release/bespoke"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("-o", "--output", required=True, type=pathlib.Path)
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 * args.threads:
        parser.error(f"two workers of {args.threads} threads need more than {len(cores)} cores")
    shares = [cores[: args.threads], cores[args.threads : 2 * args.threads]]
    texts = [",".join(map(str, share)) for share in shares]
    points = measure(args, texts[0])
    keys = ("rows", "prompt", "generated", "rate")
    worker = model.fit([tuple(point[key] for key in keys) for point in points])
    errors = [
        abs(worker.rate(*(point[key] for key in keys[:3])) / point["rate"] - 1) for point in points
    ]
    print(f"fitted: {100 * statistics.median(errors):.1f} % off, {100 * max(errors):.1f} % at most")
    checks = check(args, worker, texts)
    write(args, args.output, points, worker, checks)
    print(f"{args.output / 'capacity.html'}")


if __name__ == "__main__":
    main()
