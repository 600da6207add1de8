#!/usr/bin/env bash
# Runs a program where nothing is made at run time: a root folder that holds the program, the loader
# and libc, and its model if that is not within it; read-only, without /proc, /tmp, a home, a compiler
# or a network.
#
#   tests/build/bare_root.sh PROGRAM [MODEL]
#
# Takes root, or user namespaces.
set -euo pipefail
program=$(realpath "$1")
model=${2:+$(realpath "$2")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/root"
cp "$program" "$work/root/program"
arguments=()
if [[ -n $model ]]; then
    cp -rL "$model" "$work/root/model"
    arguments=(--model /model)
fi
ldd "$program" | grep -o '/[^ ]*' | while read -r library; do
    mkdir -p "$work/root$(dirname "$library")"
    cp "$library" "$work/root$library"
done

spaces=(--mount --net)
[[ $(id -u) == 0 ]] || spaces+=(--map-root-user)
if ! unshare "${spaces[@]}" true 2>/dev/null; then
    echo 'skipped: this user may not unshare'
    exit 0
fi
question=(--prompt 'The capital of France is' --max-tokens 8)
expected=$("$program" generate ${model:+--model "$model"} "${question[@]}" 2>"$work/err")
# shellcheck disable=SC2016 # expanded inside
answer=$(unshare "${spaces[@]}" bash -c '
    set -euo pipefail
    root=$1 chroot=$2
    shift 2
    mount --bind "$root" "$root"
    mount -o remount,bind,ro "$root"
    if touch "$root/file" 2>/dev/null; then
        echo "the root folder can be written" >&2
        exit 1
    fi
    env -i "$chroot" "$root" /program doctor >&2
    env -i "$chroot" "$root" /program generate "$@"
' bash "$work/root" "$(PATH=$PATH:/usr/sbin command -v chroot)" \
    "${arguments[@]}" "${question[@]}" --startup-report 2>"$work/err") || {
    cat "$work/err" >&2
    exit 1
}
cat "$work/err"
echo "$answer"
if [[ -z $answer || $answer != "$expected" ]]; then
    echo "elsewhere it answers: $expected" >&2
    exit 1
fi
if ! grep -q 'first token' "$work/err"; then
    echo 'no report of the start' >&2
    exit 1
fi
