"""What the same GPU does by the libraries at hand, and our kernels beside it.

    compare.py measure MODELS   one JSON object: bandwidths, cuBLAS and attention through PyTorch,
                                for the shapes of the models' config.json
    compare.py report RESULTS   a table of results/results.json and results/records: the default and
                                the fastest kernel of each case, shares of bandwidth and of cuBLAS
"""

import json
import pathlib
import re
import sys

ROWS = [1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192]
PREFILL = [512, 2048, 8192]
DECODE = [(1, 1024), (1, 16384), (8, 2048), (32, 1024), (32, 4096), (128, 1024)]
# Memory that launches go through: more than the caches hold.
COLD_BYTES = 256 << 20
LAUNCHES = 64
SAMPLES = 25


def shapes(folder):
    """Sizes of every config.json below a folder."""
    for path in sorted(pathlib.Path(folder).glob("*/config.json")):
        config = json.loads(path.read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads", heads)
        head_dim = config.get("head_dim") or hidden // heads
        inner = config["intermediate_size"]
        linears = {
            "qkv": ((heads + 2 * kv_heads) * head_dim, hidden),
            "o": (hidden, heads * head_dim),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        # Tiny models say nothing about speed.
        if hidden >= 1024:
            yield path.parent.name, linears, (heads, kv_heads, head_dim)


def measure(folder):
    import torch

    def times(launch, count):
        """Microseconds of one of `count` launches, replayed from a graph; the median."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            launch(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for idx in range(count):
                launch(idx)
        graph.replay()
        samples = []
        for _ in range(SAMPLES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1e3 / count)
        return sorted(samples)[len(samples) // 2]

    def random(*size, dtype=torch.bfloat16):
        return torch.randn(*size, device="cuda", dtype=dtype)

    result = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name(), "gemm": [],
              "prefill": [], "decode": []}
    source = random(1 << 28, dtype=torch.float32)
    target = torch.empty_like(source)
    size = source.numel() * 4
    result["read_gb_per_s"] = size / times(lambda _: source.sum(), 4) / 1e3
    result["copy_gb_per_s"] = 2 * size / times(lambda _: target.copy_(source), 4) / 1e3
    del source, target
    done = set()
    for name, linears, heads in shapes(folder):
        for role, (n, k) in linears.items():
            if (n, k) in done:
                continue
            done.add((n, k))
            copies = max(1, min(LAUNCHES, COLD_BYTES // (2 * n * k)))
            weights = [random(n, k) for _ in range(copies)]
            for rows in ROWS:
                x = random(rows, k)
                out = torch.empty(rows, n, device="cuda", dtype=torch.bfloat16)
                launch = lambda i: torch.mm(x, weights[i % copies].t(), out=out)
                us = times(launch, LAUNCHES if rows < 512 else 8)
                result["gemm"].append({"model": name, "role": role, "n": n, "k": k, "rows": rows,
                                       "us": us, "tflop_per_s": 2 * n * k * rows / us / 1e6})
            del weights
        if heads in done:
            continue
        done.add(heads)
        attend(torch, times, random, name, heads, result)
    return result


def attend(torch, times, random, name, heads, result):
    num_heads, kv_heads, head_dim = heads
    attention = torch.nn.functional.scaled_dot_product_attention
    for length in PREFILL:
        q = random(1, num_heads, length, head_dim)
        # Repeated heads: what this function wants where it knows no groups.
        k, v = (random(1, num_heads, length, head_dim) for _ in range(2))
        us = times(lambda _: attention(q, k, v, is_causal=True), 4)
        flops = 2 * num_heads * head_dim * length * (length + 1)
        result["prefill"].append({"model": name, "tokens": length, "us": us,
                                  "tflop_per_s": flops / us / 1e6})
    for sequences, context in DECODE:
        q = random(sequences, num_heads, 1, head_dim)
        size = 2 * 2 * sequences * kv_heads * context * head_dim
        copies = max(1, min(16, COLD_BYTES // size))
        caches = [[random(sequences, kv_heads, context, head_dim) for _ in range(2)]
                  for _ in range(copies)]
        try:
            launch = lambda i: attention(q, *caches[i % copies], enable_gqa=True)
            us = times(launch, 16)
        except (TypeError, RuntimeError) as error:
            result["decode"].append({"model": name, "sequences": sequences, "context": context,
                                     "error": str(error)[:200]})
            continue
        result["decode"].append({"model": name, "sequences": sequences, "context": context,
                                 "us": us, "gb_per_s": size / us / 1e3})


def measured(folder):
    """The times of all records below a folder, by kernel's spec and case."""
    times = {}
    for path in sorted(pathlib.Path(folder).glob("**/*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("kind") == "time":
                problem = record["problem"]
                times.setdefault((problem["spec"], problem["case"]), []).append(record)
    return times


def report(folder):
    """Lines of a table."""
    results = json.loads((pathlib.Path(folder) / "results.json").read_text())
    parts = results["parts"]
    lines = [f"{name}: " + {None: "skipped", 0: "passed"}.get(part["exit_code"], "FAILED")
             for name, part in parts.items()]
    # Everything that was ever measured here: a run with a budget goes on where another ended.
    times = measured(pathlib.Path(folder) / "records")
    torch = (parts.get("torch") or {}).get("output") or {}
    if not times:
        return lines
    if torch:
        read, copy = torch["read_gb_per_s"], torch["copy_gb_per_s"]
        lines.append(f"read {read:.0f} GB/s, copy {copy:.0f} GB/s")
    peers = {(p["n"], p["k"], p["rows"]): p["us"] for p in torch.get("gemm", [])}
    lines.append(f"{'spec':52} {'case':16} {'default':>9} {'best us':>9} {'ratio':>6} "
                 f"{'% limit':>8} {'TFLOP/s':>8} {'x bf16 cuBLAS':>13}  best")
    for (spec, case), records in sorted(times.items(), key=order):
        best = min(records, key=lambda record: record["result"]["vs_default"])
        time = best["result"]
        us = time["us"][1]
        sizes = re.match(r"(?:awq_)?gemm_n(\d+)_k(\d+)_", spec)
        n, k, rows = (*map(int, sizes.groups()), int(case.split()[1])) if sizes else (0, 0, 0)
        peer = peers.get((n, k, rows))
        share = f"{100 * time['limit_us'] / us:.1f}" if time.get("limit_us") else ""
        rate = f"{2 * n * k * rows / us / 1e6:.1f}" if sizes else ""
        lines.append(f"{spec:52} {case:16} {us / time['vs_default']:9.1f} {us:9.1f} "
                     f"{time['vs_default']:6.3f} {share:>8} {rate:>8} "
                     f"{f'{peer / us:.2f}' if peer else '':>13}  {best['variant']['symbol']}")
    for name, part in parts.items():
        for point in ((part["output"] or {}).get("points", []) if name.startswith("bench") else []):
            lines.append(f"{name}, {point['concurrency']} at once: "
                         f"{point['decode_tokens_per_s']} tokens/s")
    return lines


def order(item):
    """Specs by name, their cases by their numbers."""
    spec, case = item[0]
    return spec, case.split()[0], [int(number) for number in re.findall(r"\d+", case)]


if __name__ == "__main__":
    command, folder = sys.argv[1:] if len(sys.argv) == 3 else ("", "")
    if command == "measure":
        print(json.dumps(measure(folder)))
    elif command == "report":
        print("\n".join(report(folder)))
    else:
        sys.exit(__doc__)
