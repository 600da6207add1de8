#!/usr/bin/env bash
# `bespoke build` as a whole: takes four builds, and root for the empty root folder.
#
#   tests/build/one_model.sh MODEL
#
# MODEL is a folder with weights, a tokenizer and 4-bit linears, such as quickstart makes.
set -euo pipefail
model=$(realpath "$1")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"
bespoke=${BESPOKE:-$root/target/release/bespoke}
# A shell variable would change the times below.
unset BESPOKE_HOME

echo '== build, with the weights'
"$bespoke" build "$model" -o "$work/one" --embed-weights

echo '== the same source at another path gives the same bytes'
git clone --quiet "$root" "$work/elsewhere"
"$bespoke" build "$model" -o "$work/two" --embed-weights --source "$work/elsewhere"
cmp "$work/one" "$work/two"

echo '== no path of this machine is in it'
if grep -a -o -F -e "$root" -e "$work" -e "$(realpath ~)/" "$work/one" | sort | uniq -c | grep .; then
    exit 1
fi

echo '== it answers in a folder that has nothing but the loader and libc, read-only, without /proc'
tests/build/bare_root.sh "$work/one"

echo '== a cut or changed file says so'
size=$(stat -c %s "$work/one")
head -c $((size - 100)) "$work/one" >"$work/cut"
cp "$work/one" "$work/changed"
printf X | dd of="$work/changed" bs=1 seek=$((size - 200)) conv=notrunc status=none
cp "$work/one" "$work/flipped"
printf XXXX | dd of="$work/flipped" bs=1 seek=$((size / 2)) conv=notrunc status=none
chmod +x "$work/cut" "$work/changed" "$work/flipped"
for file in cut changed flipped; do
    if "$work/$file" generate --prompt a --max-tokens 1 2>"$work/error"; then
        echo "$file was not noticed"
        exit 1
    fi
    grep -E 'damaged|truncated' "$work/error"
done

echo '== the limit on machine code'
if "$bespoke" build "$model" -o "$work/none" --max-kernel-bytes 1000 2>"$work/error"; then
    exit 1
fi
grep -F 'more than --max-kernel-bytes 1000' "$work/error"
test ! -e "$work/none"

echo '== sizes that no common model has'
"$bespoke" build tests/build/odd -o "$work/odd" --target cpu
"$work/odd" verify
"$work/odd" generate --load-format dummy --prompt-ids 1,2,3 --max-tokens 4 --model tests/build/odd

echo '== passed'
