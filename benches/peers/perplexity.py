#!/usr/bin/env python3
"""The perplexity of one model by Bespoke and by llama.cpp, which reads it as an exported GGUF file.

    benches/peers/perplexity.py MODEL             a model folder or the name of a cached model
    benches/peers/perplexity.py MODEL --within 0.15

Both follow llama.cpp's protocol: the whole text without a BOS, chunks of --ctx tokens, each alone,
the second half scored. llama.cpp comes as the Python package cyllama, which has it compiled; a
virtual environment with it is made below target/. llama.cpp rounds activations of 4-bit layers to
8 bits; Bespoke is measured with float32 and with 8-bit ones.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import python_environment  # noqa: E402


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--file", default=ROOT / "tests/golden/wikitext2-eval.txt")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="of llama.cpp, default all")
    parser.add_argument("--weights", choices=["q4_1", "q5_0"], default="q4_1")
    parser.add_argument("--head", choices=["keep", "f16", "q8_0"], default="keep")
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/bespoke")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--within", type=float, help="fail if the two are further apart")
    return parser.parse_args()


def bespoke(options, *args):
    """Runs a command of Bespoke and reads its JSON."""
    command = [options.binary.resolve(), *args, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def ours(options, activations):
    """Bespoke's perplexity."""
    return bespoke(
        options, "perplexity", "--model", options.model, "--file", options.file,
        "--ctx", str(options.ctx), "--activations", activations, "--threads", str(options.threads),
    )


def negative_log_likelihood(logits, token):
    """−ln softmax(logits)[token]"""
    import numpy as np

    logits = np.asarray(logits, dtype=np.float64)
    top = logits.max()
    return float(top + np.log(np.exp(logits - top).sum()) - logits[token])


def theirs(options, path):
    """llama.cpp's perplexity of a GGUF file, in the form of ours."""
    from cyllama.llama import llama_cpp as llama
    import numpy as np

    class Model(llama.LlamaModel):
        """With what this version of cyllama reads of a model and does not give it."""

        @property
        def n_vocab(self):
            return self.get_vocab().n_vocab

    llama.disable_logging()
    llama.llama_backend_init()
    model = Model(str(path))
    params = llama.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = options.ctx
    params.n_threads = params.n_threads_batch = options.threads
    context = llama.LlamaContext(model, params)
    text = pathlib.Path(options.file).read_text(encoding="utf-8")
    ids = model.get_vocab().tokenize(text, False, True)
    nll_sum, num_scored = 0.0, 0
    num_chunks = len(ids) // options.ctx
    if options.chunks is not None:
        num_chunks = min(num_chunks, options.chunks)
    for idx in range(num_chunks):
        chunk = ids[idx * options.ctx : (idx + 1) * options.ctx]
        context.kv_cache_clear()
        batch = llama.LlamaBatch(n_tokens=options.ctx, embd=0, n_seq_max=1)
        scored = range(options.ctx // 2, options.ctx - 1)
        for position, token in enumerate(chunk):
            batch.add(token, position, [0], position in scored)
        context.decode(batch)
        for position in scored:
            logits = context.get_logits_ith(position)
            nll_sum += negative_log_likelihood(logits, chunk[position + 1])
            num_scored += 1
        so_far = np.exp(nll_sum / num_scored)
        print(f"\rllama.cpp: chunk {idx + 1} of {num_chunks}: {so_far:.4f}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {
        "ppl": float(np.exp(nll_sum / num_scored)), "tokens_scored": num_scored,
        "chunks": num_chunks, "nll_sum": nll_sum,
    }


def main():
    """Measures and prints a line for each."""
    options = arguments()
    python_environment.enter("peers-python", "cyllama==0.2.18", "numpy==2.2.6")
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "model.gguf"
        export = bespoke(
            options, "export", "gguf", options.model, "-o", path,
            "--weights", options.weights, "--head", options.head,
        )
        rows = [
            ("bespoke, float32 activations", ours(options, "float")),
            ("bespoke, int8 activations", ours(options, "int8")),
            ("llama.cpp", theirs(options, path)),
        ]
    print(
        f"{options.model}: {export['bytes']:,} bytes as GGUF; {export['rounded_groups']:,} of "
        f"{export['groups']:,} groups rounded, by {export['error_max_steps']:.4f} of a step at most"
    )
    for name, result in rows:
        print(f"{name:30} {result['ppl']:9.4f}   {result['tokens_scored']} tokens scored")
    apart = abs(rows[0][1]["ppl"] - rows[2][1]["ppl"])
    print(f"apart: {apart:.4f}")
    if options.within is not None and not apart <= options.within:
        sys.exit(f"further apart than {options.within}")


main()
