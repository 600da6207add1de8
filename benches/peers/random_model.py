#!/usr/bin/env python3
"""A checkpoint with random 4-bit weights in the shape of a preset, to measure speed with.

    benches/peers/random_model.py qwen2.5-0.5b FOLDER --tokenizer smollm2-135m-awq-g64

The embedding is float16, linears are in AWQ's "gemm" form. The tokenizer is that of another model,
whose vocabulary is no larger.
"""

import argparse
import json
import pathlib
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import programs  # noqa: E402
import python_environment  # noqa: E402

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("preset", help="a file of kernel-gen/models, without .json")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tokenizer", required=True, help="a cached model")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def linear(random, name, num_in, num_out, group_size, bias):
    """The tensors of a linear: any bits are weights and zeros, scales keep outputs near one."""
    import numpy as np

    def words(rows):
        return random.integers(-(2**31), 2**31, (rows, num_out // 8), dtype=np.int32)

    groups = num_in // group_size
    scale = 1 / (4.6 * num_in**0.5)
    tensors = {
        f"{name}.qweight": words(num_in),
        f"{name}.qzeros": words(groups),
        f"{name}.scales": np.full((groups, num_out), scale, dtype=np.float16),
    }
    if bias:
        tensors[f"{name}.bias"] = np.zeros(num_out, dtype=np.float16)
    return tensors


def tensors(config, group_size, seed):
    """All tensors of the checkpoint."""
    import numpy as np

    random = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    width = config["num_attention_heads"] * head_dim
    kv_width = config["num_key_value_heads"] * head_dim
    qkv_bias = config["model_type"] == "qwen2"
    embedding = random.standard_normal((config["vocab_size"], hidden), dtype=np.float32)
    all_tensors = {"model.embed_tokens.weight": (embedding * 0.02).astype(np.float16)}
    norms = ["model.norm.weight"]
    for idx in range(config["num_hidden_layers"]):
        layer = f"model.layers.{idx}"
        linears = [
            ("self_attn.q_proj", hidden, width, qkv_bias),
            ("self_attn.k_proj", hidden, kv_width, qkv_bias),
            ("self_attn.v_proj", hidden, kv_width, qkv_bias),
            ("self_attn.o_proj", width, hidden, False),
            ("mlp.gate_proj", hidden, inner, False),
            ("mlp.up_proj", hidden, inner, False),
            ("mlp.down_proj", inner, hidden, False),
        ]
        for name, num_in, num_out, bias in linears:
            name = f"{layer}.{name}"
            all_tensors |= linear(random, name, num_in, num_out, group_size, bias)
        norms += [f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"]
    all_tensors |= {name: np.ones(hidden, dtype=np.float16) for name in norms}
    return all_tensors


def main():
    options = arguments()
    python_environment.enter("peers-python", *programs.REQUIREMENTS)
    from safetensors.numpy import save_file

    preset = ROOT / f"kernel-gen/models/{options.preset}.json"
    config = json.loads(preset.read_text(encoding="utf-8"))
    tokenizer = python_environment.model_folder(options.tokenizer)
    if tokenizer is None:
        sys.exit(f"no model {options.tokenizer} in the model cache; `bespoke quickstart` makes one")
    config["torch_dtype"] = "float16"
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": options.group_size, "zero_point": True,
        "version": "gemm",
    }
    options.folder.mkdir(parents=True, exist_ok=True)
    save_file(
        tensors(config, options.group_size, options.seed), options.folder / "model.safetensors"
    )
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, options.folder / name)
    (options.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
