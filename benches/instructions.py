#!/usr/bin/env python3
"""Instructions of a decoded token and of a prompt's, which do not depend on how busy a machine is.

    benches/instructions.py MODEL [--binary target/release/bespoke] [-o FILE]

Counts by valgrind's callgrind, which has AVX2 and no AVX-512, so that the kernels of x86_64_v3 run;
one thread, so that nobody waits for others. A count is the difference of two runs, in which loading
is the same.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Prompt and answer of two runs, and what their difference is divided by.
CASES = {
    "decoded token, 5 to 36 tokens before it": ((4, 2), (4, 34)),
    "token of a prompt of 512": ((4, 2), (512, 2)),
}


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a model folder or the name of a cached model")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/bespoke")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="write the table there as well")
    return parser.parse_args()


def instructions(options, prompt, answer):
    """Of one run."""
    ids = ",".join(str(17 + 7919 * idx % 40000) for idx in range(prompt))
    with tempfile.NamedTemporaryFile() as counts:
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={counts.name}",
            options.binary, "generate", "--model", options.model, "--threads", "1",
            "--prompt-ids", ids, "--max-tokens", str(answer), "--ignore-eos",
            # Or the first run would pack, and the others read what it has packed.
            "--no-packed-cache",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = re.search(r"Collected : (\d+)", done.stderr)
        if done.returncode != 0 or not found:
            sys.exit(done.stderr[-2000:])
        return int(found[1])


def main():
    options = arguments()
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed")
    runs, lines = {}, ["| per | instructions |", "|---|---|"]
    for what, (short, long) in CASES.items():
        for lengths in (short, long):
            if lengths not in runs:
                runs[lengths] = instructions(options, *lengths)
        tokens = sum(long) - sum(short)
        lines.append(f"| {what} | {(runs[long] - runs[short]) / tokens:,.0f} |")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
