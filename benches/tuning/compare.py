#!/usr/bin/env python3
"""Builds with different locks side by side, end to end: decoding at several row counts, one prompt.

    benches/tuning/compare.py MODEL default=PATH tuned=PATH [again=PATH] [--rounds 11] [-o FILE]

Every round runs each binary once in turn at each row count, the first one a second time at the
round's end. The time of a run is the median of its steps, or its shortest prompt; a ratio is the
median over rounds of a time and the mean of the first binary's two. Noise is the same of the first
binary's own second run, with the error of a median of so many.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess

ROWS = [1, 2, 4, 8, 16, 64]
PROMPT = 512


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a model folder or the name of a cached model")
    parser.add_argument("binaries", nargs="+", metavar="NAME=PATH", help="the first is the base")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int, default=32, help="tokens before those that decode")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="write the table there as well")
    options = parser.parse_args()
    options.binaries = [binary.partition("=")[::2] for binary in options.binaries]
    return options


def milliseconds(options, path, case):
    """Of a step with so many rows, or of a prompt."""
    prompt, tokens = (PROMPT, 1) if case == PROMPT else (options.context, 48 if case < 64 else 24)
    rows = 1 if case == PROMPT else case
    command = [
        path, "bench", "--model", options.model, "--json", "--concurrency", str(rows),
        "--prompt-tokens", str(prompt), "--max-tokens", str(tokens), "--rounds", "3",
    ]
    if options.threads:
        command += ["--threads", str(options.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    points = json.loads(done.stdout)["points"]
    of = "ttft_ms" if case == PROMPT else "tpot_ms"
    return min(point[of]["p50"] for point in points)


def measure(options):
    """Times by case and binary, a list over rounds; those of the base are pairs."""
    cases = [*ROWS, PROMPT]
    times = {case: {name: [] for name, _ in options.binaries} for case in cases}
    base, path = options.binaries[0]
    for _ in range(options.rounds):
        for case in cases:
            before = milliseconds(options, path, case)
            for name, other in options.binaries[1:]:
                times[case][name].append(milliseconds(options, other, case))
            times[case][base].append((before, milliseconds(options, path, case)))
    return times


def ratio(of_base, times):
    """Of a binary's times to the base's."""
    return statistics.median(time / ((a + b) / 2) for time, (a, b) in zip(times, of_base))


def noise(of_base):
    """By how much the base differs from itself."""
    ratios = [b / a for a, b in of_base]
    middle = statistics.median(ratios)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in ratios)
    return abs(middle - 1) + 1.2533 * spread / math.sqrt(len(ratios))


def table(options, times):
    """Markdown: a row for each case, and the geometric means."""
    base, *others = [name for name, _ in options.binaries]
    heads = ["rows", f"{base}, ms", *[f"{name}, ms | {name} / {base}" for name in others], "noise"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * (3 + 2 * len(others)) + "|"]
    ratios = {name: [] for name in others}
    for case, all_times in times.items():
        of_base = all_times[base]
        cells = [f"prompt of {case}" if case == PROMPT else str(case)]
        cells.append(f"{statistics.median(one for pair in of_base for one in pair):.3f}")
        for name in others:
            ratios[name].append(ratio(of_base, all_times[name]))
            cells.append(f"{statistics.median(all_times[name]):.3f}")
            cells.append(f"{ratios[name][-1]:.3f}")
        lines.append("| " + " | ".join([*cells, f"{noise(of_base):.3f}"]) + " |")
    for name in others:
        mean = statistics.geometric_mean(ratios[name])
        lines.append(f"\n{name}: {mean:.3f} of {base} in the geometric mean, {1 / mean:.3f} times as fast.")
    for one, other in zip(others, others[1:]):
        apart = [a / b for a, b in zip(ratios[one], ratios[other])]
        mean = statistics.geometric_mean(apart)
        lines.append(f"\n{one} / {other}: {mean:.3f}; " + ", ".join(f"{a:.3f}" for a in apart) + ".")
    return "\n".join(lines) + "\n"


def main():
    options = arguments()
    text = table(options, measure(options))
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
