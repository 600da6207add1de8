"""Measures the server at its limits: start, hostile clients, drain. Prints tables."""

import http.client
import json
import pathlib
import random
import signal
import socket
import statistics
import subprocess
import threading
import time

from bespoke_server import Server

NUM_STARTS = 11
NUM_HOSTILE = 1000
NUM_GOOD = 32
NUM_ROUNDS = 5
REQUESTS_A_ROUND = 6
NUM_STREAMS = 256
NUM_DRAINS = 5
MODEL = "limits"
PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status_of(port, path):
    """Status and Retry-After of a GET; 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.getheader("retry-after")
    except OSError:
        return 0, None
    finally:
        connection.close()


def body(prompt, max_tokens):
    """A streamed completion that ends at its length."""
    return json.dumps({
        "model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    })


def percentile(values, share):
    """The value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure_start(binary, model):
    """Milliseconds from the start of the process to the first 200 of /ready."""
    times = []
    for _ in range(NUM_STARTS + 1):
        port = free_port()
        command = [binary, "serve", "--model", str(model), "--port", str(port)]
        begin = time.perf_counter()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as server:
            while status_of(port, "/ready")[0] != 200:
                if server.poll() is not None or time.perf_counter() > begin + 60:
                    raise RuntimeError("the server did not get ready")
                time.sleep(0.002)
            times.append((time.perf_counter() - begin) * 1000)
            server.send_signal(signal.SIGTERM)
    # The first one warms the file cache.
    times = times[1:]
    print(f"exec to /ready, {NUM_STARTS} starts: median {statistics.median(times):.0f} ms, "
        f"{min(times):.0f} to {max(times):.0f}")


class Hostile:
    """Sockets that say nothing, say it slowly, or do not listen to long answers."""

    def __init__(self, port):
        self.port = port
        self.sockets = []
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def connect(self, idx):
        """One socket, from one of many addresses of this machine."""
        client = socket.socket()
        client.bind((f"127.0.0.{10 + idx // 50}", 0))
        client.connect(("127.0.0.1", self.port))
        if idx % 3 == 1:
            client.sendall(b"G")
        if idx % 3 == 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" * 4)
        return client

    def __enter__(self):
        self.sockets = [self.connect(idx) for idx in range(NUM_HOSTILE)]
        self.thread.start()
        return self

    def run(self):
        """A byte every ten seconds; whoever was given up comes again."""
        while not self.is_over.wait(10):
            for idx, client in enumerate(self.sockets):
                try:
                    if idx % 3 == 1:
                        client.sendall(b"E")
                    elif idx % 3 == 0 and client.recv(1, PEEK) == b"":
                        raise ConnectionResetError
                except BlockingIOError:
                    pass
                except OSError:
                    client.close()
                    self.sockets[idx] = self.connect(idx)

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()
        for client in self.sockets:
            client.close()


def first_token_times(port):
    """Milliseconds to the first token of each request of a round of good clients."""
    times, problems = [], []

    def client(seed):
        draw = random.Random(seed)
        for _ in range(REQUESTS_A_ROUND):
            prompt = " ".join(draw.choice(["coat", "moon", "needle", "thread"]) for _ in range(24))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            begin = time.perf_counter()
            connection.request("POST", "/v1/completions", body(prompt, 8),
                {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.readline()
            times.append((time.perf_counter() - begin) * 1000)
            if answer.status != 200 or b"[DONE]" not in answer.read():
                problems.append(answer.status)
            connection.close()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(NUM_GOOD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise RuntimeError(f"good clients were turned away: {problems}")
    return times


def resident_bytes(process):
    """Memory of a process."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmRSS" in line)


def measure_hostile(binary, model):
    """First tokens of 32 clients with and without 1,000 hostile sockets, in turn."""
    server = Server(binary, model, "--served-model-name", MODEL, "--max-connections", "1200")
    port = int(server.url.rsplit(":", 1)[1])
    alone, beside, growth = [], [], []
    try:
        first_token_times(port)
        for _ in range(NUM_ROUNDS):
            alone.append(first_token_times(port))
            before = resident_bytes(server.process)
            with Hostile(port):
                # They stay; what is measured is what they cost then, not their arrival.
                time.sleep(3)
                beside.append(first_token_times(port))
                growth.append((resident_bytes(server.process) - before) / NUM_HOSTILE)
            # What has been closed is seen to be.
            time.sleep(1)
    finally:
        server.stop()
    pairs = [percentile(b, 0.99) / percentile(a, 0.99) for a, b in zip(alone, beside)]
    all_alone, all_beside = sum(alone, []), sum(beside, [])
    print(f"first token of {NUM_GOOD} clients, {NUM_ROUNDS} rounds in turn, p99: alone "
        f"{percentile(all_alone, 0.99):.0f} ms, beside {NUM_HOSTILE} hostile sockets "
        f"{percentile(all_beside, 0.99):.0f} ms, ratio "
        f"{percentile(all_beside, 0.99) / percentile(all_alone, 0.99):.2f} (of rounds: "
        f"{', '.join(f'{pair:.2f}' for pair in pairs)}); p50 "
        f"{percentile(all_alone, 0.5):.0f} and {percentile(all_beside, 0.5):.0f} ms; memory per "
        f"hostile socket: {max(growth) / 1024:.1f} KiB at most")


def stream(port, max_tokens, ends):
    """A streamed answer; how it ended goes into `ends`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", body("Once upon a time", max_tokens),
            {"Content-Type": "application/json"})
        text = connection.getresponse().read()
        is_whole = b"[DONE]" in text and b"error" not in text
        ends.append("whole" if is_whole else "error event" if b"error" in text else "cut")
    except OSError:
        ends.append("refused")
    finally:
        connection.close()


def drain_once(binary, model, backend, max_tokens):
    """Signals a server with 256 streams; what was seen."""
    server = Server(binary, model, "--served-model-name", MODEL, "--backend", backend,
        "--drain-timeout", "10", "--max-connections-per-client", "300")
    port = int(server.url.rsplit(":", 1)[1])
    ends = []
    threads = [threading.Thread(target=stream, args=(port, max_tokens, ends))
        for _ in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    while not server.metric("bespoke_engine_running"):
        time.sleep(0.01)
    time.sleep(1)
    # A connection that is there already: the listener takes no new ones for long.
    probe = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    probe.connect()
    begin = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    server.is_draining = True
    while True:
        probe.request("GET", "/ready")
        answer = probe.getresponse()
        answer.read()
        if answer.status == 503:
            break
    ready_ms = (time.perf_counter() - begin) * 1000
    refused = status_of(port, "/ready")
    for thread in threads:
        thread.join()
    exit_status = server.stop()
    seconds = time.perf_counter() - begin
    counts = {end: ends.count(end) for end in sorted(set(ends))}
    print(f"| {backend} | {max_tokens} | {ready_ms:.0f} | {refused} | {counts} | {seconds:.1f} | "
        f"{exit_status} |")


def measure_drain(binary, model):
    """SIGTERM with 256 streams: of short answers, and of answers that do not fit the time."""
    print("| backend | tokens an answer | ms to /ready 503 | a new connection | streams | "
        "s to the exit | exit status |\n|---|---|---|---|---|---|---|")
    for _ in range(NUM_DRAINS):
        drain_once(binary, model, "cpu", 32)
    drain_once(binary, model, "cpu", 1000)


def run(binary, model):
    """All measurements."""
    measure_start(binary, model)
    measure_hostile(binary, model)
    measure_drain(binary, model)
    return 0
