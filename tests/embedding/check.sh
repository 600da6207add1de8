#!/usr/bin/env bash
# Builds the program of this folder outside of the repository, from the packages of the three crates
# that it needs: its tests, an answer, and the programs in `wrong/`, which must not compile.
#
#   tests/embedding/check.sh
#
# Takes the uncommitted files too. What it compiles lies in target/embedding.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}/embedding
unset BESPOKE_MODEL

echo '== format'
(cd "$here" && cargo fmt --check)

echo '== package the crates'
packages=(bespoke bespoke-kernel-gen bespoke-macros)
(cd "$root" && cargo package --quiet --locked --allow-dirty --no-verify \
    --target-dir "$work/target" "${packages[@]/#/--package=}")
mkdir "$work/crates"
for package in "${packages[@]}"; do
    tar -xzf "$work/target/package/$package"-[0-9]*.crate -C "$work/crates"
done
if find "$work/crates" -type l | grep .; then
    echo 'a package holds links, which lead nowhere elsewhere' >&2
    exit 1
fi

echo '== tests of a program that is made from them'
mkdir -p "$work/golden/tiny"
cp -r "$root/tests/golden/tiny/llama-awq-g32" "$work/golden/tiny/"
cp -r "$here" "$work/embedding"
{
    echo '[patch.crates-io]'
    for package in "${packages[@]}"; do
        echo "$package = { path = \"$(echo "$work/crates/$package"-[0-9]*)\" }"
    done
} >"$work/embedding/.cargo/config.toml"
cd "$work/embedding"
cargo test --locked
cargo clippy --locked --all-targets -- -D warnings

echo '== an answer'
cp tokenizer.json ../golden/tiny/llama-awq-g32/
answer=$(cargo run --quiet --locked -- ../golden/tiny/llama-awq-g32 'Once upon a time')
echo "$answer"
[[ -n $answer ]]

echo '== what does not fit the model does not compile'
for expected in wrong/*.txt; do
    name=$(basename "$expected" .txt)
    if cargo check --quiet --locked --features wrong --example "$name" 2>"$work/stderr"; then
        echo "wrong/$name.rs compiles" >&2
        exit 1
    fi
    while IFS= read -r line; do
        if ! grep -qF -- "$line" "$work/stderr"; then
            cat "$work/stderr"
            echo "wrong/$name.rs: the compiler does not say: $line" >&2
            exit 1
        fi
        echo "$name: $line"
    done <"$expected"
done
