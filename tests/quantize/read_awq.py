#!/usr/bin/env python3
"""Reads AWQ "gemm" checkpoints without any of Bespoke's code and compares every weight, bit for bit,
with what Bespoke computes with.

    tests/quantize/read_awq.py                    the tiny models, and those in the model cache
    tests/quantize/read_awq.py FOLDER …           these model folders

Makes a virtual environment with numpy and safetensors below target/, and runs `bespoke
dequantize`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

import python_environment  # noqa: E402

# The nibble at bits 4·p of a word holds column ORDER[p] of its eight.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=pathlib.Path)
    parser.add_argument("--binary", type=pathlib.Path, default=ROOT / "target/release/bespoke")
    return parser.parse_args()


def nibbles(words):
    """[rows, words] int32 → [rows, 8 · words] from 0 to 15."""
    import numpy as np

    # NOTE: as signed numbers the shifts would smear the uppermost nibble.
    words = words.view(np.uint32)
    out = np.empty((*words.shape, 8), np.uint8)
    for position, column in enumerate(ORDER):
        out[..., column] = (words >> np.uint32(4 * position)) & np.uint32(15)
    return out.reshape(words.shape[0], -1)


def dequantized(qweight, qzeros, scales, group_size):
    """float32 [outputs, inputs]: (q − z) · s, each input with the zero and scale of its group."""
    import numpy as np

    q = nibbles(qweight).astype(np.float32)
    num_inputs = q.shape[0]
    size = num_inputs if group_size == -1 else group_size
    assert num_inputs % size == 0 and scales.shape == (num_inputs // size, q.shape[1])
    zeros = nibbles(qzeros).astype(np.float32)
    assert zeros.shape == scales.shape and scales.dtype == np.float16
    group = np.arange(num_inputs) // size
    return np.ascontiguousarray(((q - zeros[group]) * scales.astype(np.float32)[group]).T)


class Folder:
    """The tensors of a model folder, single or in shards."""

    def __init__(self, path):
        from safetensors import safe_open

        names = sorted(path.glob("*.safetensors"))
        names = [name for name in names if name.name != "expected.safetensors"]
        self.files = [safe_open(name, framework="numpy") for name in names]
        self.places = {key: file for file in self.files for key in file.keys()}

    def __getitem__(self, name):
        return self.places[name].get_tensor(name)

    def modules(self):
        """Names of the quantized linears."""
        return sorted(name[: -len(".qweight")] for name in self.places if name.endswith(".qweight"))


def check(folder, binary):
    """Compares one folder; the number of modules and of weights."""
    import numpy as np

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"]) == ("awq", "gemm", 4)
    checkpoint = Folder(folder)
    num_weights = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        output = scratch / "dequantized.safetensors"
        subprocess.run([binary, "dequantize", folder, "-o", output], check=True)
        ours = Folder(scratch)
        assert sorted(ours.places) == [f"{name}.weight" for name in checkpoint.modules()]
        for name in checkpoint.modules():
            parts = [checkpoint[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
            expected = dequantized(*parts, config["group_size"])
            found = ours[f"{name}.weight"]
            if found.shape != expected.shape or found.dtype != expected.dtype:
                sys.exit(f"{folder}: {name}: {found.dtype} {found.shape}, not {expected.shape}")
            differs = found.view(np.uint32) != expected.view(np.uint32)
            if differs.any():
                place = tuple(int(i) for i in np.argwhere(differs)[0])
                sys.exit(
                    f"{folder}: {name}: {int(differs.sum())} of {differs.size} weights differ; the "
                    f"first at {place}: {found[place]} instead of {expected[place]}"
                )
            num_weights += expected.size
    return len(checkpoint.modules()), num_weights


def default_folders():
    """What there is to read without being told."""
    tiny = sorted((ROOT / "tests/golden/tiny").glob("llama-awq-*"))
    cached = ["smollm2-135m-rtn-g64", "smollm2-135m-awq-g64"]
    return tiny + [path for path in map(python_environment.model_folder, cached) if path]


def main():
    """Checks what the command line asks for."""
    options = arguments()
    python_environment.enter("awq-python", "numpy==2.2.6", "safetensors==0.8.0")
    folders = options.folders or default_folders()
    for folder in folders:
        num_modules, num_weights = check(folder, options.binary.resolve())
        if num_modules == 0:
            sys.exit(f"{folder}: no quantized linears")
        print(f"{folder.name}: {num_weights:,} weights of {num_modules} linears are equal")
    print(f"{len(folders)} passed, 0 failed")


main()
