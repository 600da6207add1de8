#!/usr/bin/env python3
"""mistral.rs on a GGUF file: prints its own rates of a prompt and of decoding as JSON.

    benches/peers/mistral_rs.py FILE [--prompt-words 512] [--max-tokens 128]
"""

import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import python_environment  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--prompt-words", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    python_environment.enter("mistral-rs-python", "mistralrs==0.9.5")
    from mistralrs import CompletionRequest, Runner, Which

    file = options.file.resolve()
    which = Which.GGUF(quantized_model_id=str(file.parent), quantized_filename=file.name)
    request = CompletionRequest(
        model="default", prompt="sea " * options.prompt_words, max_tokens=options.max_tokens,
        temperature=0.0,
    )
    usage = Runner(which=which).send_completion_request(request).usage
    rates = {"prompt": usage.avg_prompt_tok_per_sec, "decode": usage.avg_compl_tok_per_sec}
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
