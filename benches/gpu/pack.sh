#!/usr/bin/env bash
# Makes a folder that checks and measures the CUDA kernels on a machine with a GPU.
#
#   benches/gpu/pack.sh [FOLDER]
#
# Copy the folder there and run its ./check: it needs neither cargo nor the network. The kernels are
# those of BESPOKE_MODEL (by default two models of 7 to 8 billion weights, square matrices for the
# comparison with cuBLAS, and two tiny models) for BESPOKE_CUDA_TARGETS (by default sm_90a; the
# first of several is tuned). A second binary has the tuner's candidates of Llama-3.1-8B with 4-bit
# weights: about a thousand kernels, compiled once.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:-$root/target/gpu-check}
limit_mib=60

tiny=(llama-gqa2 llama-awq-g32)
presets=(llama-3.1-8b-awq qwen2.5-7b-awq)
default_models=$(IFS=:; echo "${presets[*]}"):$here/models/square-8192
for name in "${tiny[@]}"; do
    default_models+=:$root/tests/golden/tiny/$name
done
export BESPOKE_MODEL=${BESPOKE_MODEL:-$default_models}
export BESPOKE_CUDA_TARGETS=${BESPOKE_CUDA_TARGETS:-sm_90a}

tuned=${presets[0]}

cd "$root"
target=$(cargo metadata --format-version 1 --no-deps --locked |
    sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
cargo build --release --locked --features cuda
BESPOKE_TUNER=1 BESPOKE_TUNER_TARGET=${BESPOKE_CUDA_TARGETS%%,*} BESPOKE_MODEL=$tuned \
    cargo build --release --locked --features cuda --target-dir "$target/tuner"

rm -rf "$folder"
mkdir -p "$folder/models"
cp "$target/release/bespoke" "$folder/bespoke"
cp "$target/tuner/release/bespoke" "$folder/bespoke-tuner"
if command -v strip >/dev/null; then
    strip "$folder/bespoke" "$folder/bespoke-tuner"
fi
cp "$here/check" "$here/compare.py" "$folder/"
for name in "${tiny[@]}"; do
    mkdir "$folder/models/$name"
    cp "tests/golden/tiny/$name/config.json" "tests/golden/tiny/$name/model.safetensors" \
        "$folder/models/$name/"
done
for name in "${presets[@]}"; do
    mkdir "$folder/models/$name"
    cp "kernel-gen/models/$name.json" "$folder/models/$name/config.json"
done
cp -r "$here/models/square-8192" "$folder/models/"

mib=$(du -sm "$folder" | cut -f1)
echo "$folder: $mib MiB of at most $limit_mib"
if ((mib > limit_mib)); then
    echo 'the folder is too large; name fewer models or architectures' >&2
    exit 1
fi
