#!/usr/bin/env bash
# Builds the CPU kernels for aarch64 and runs them: the tests of `main.rs`, and a program with the
# kernels of tiny models, which verifies itself. Elsewhere than on aarch64 they run in qemu.
#
#   tests/aarch64/check.sh          tokens of tiny models, and their kernels against plain loops
#   tests/aarch64/check.sh --ops    and all ops at edge shapes; takes minutes more to compile
#
# Rust's library for aarch64 comes from rustup where that gets it, else from Debian's archive with
# its compiler; so do the linker and qemu where the machine has none. What comes from the archive
# lies in target/aarch64/toolchain and is not installed, so that it takes no root.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=aarch64-unknown-linux-gnu
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}/aarch64
toolchain=$CARGO_TARGET_DIR/toolchain

# apt-get with lists, states and archives of its own, for this machine's packages and arm64's.
apt() {
    local apt=$toolchain/apt
    mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
    touch "$apt/state/status"
    apt-get -qq -o Dir::State="$apt/state" -o Dir::State::status="$apt/state/status" \
        -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root \
        -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 "$@"
}

# fetch NAME PACKAGES SINGLE: unpacks PACKAGES with what they need, and SINGLE alone, into
# $toolchain/NAME. The C and C++ library are this machine's.
fetch() {
    local archives=$toolchain/apt/cache/archives unpacked=$toolchain/unpacked archive
    if [[ -d $toolchain/$1 ]]; then
        return
    fi
    if [[ $(uname -m) != x86_64 ]] || ! command -v apt-get >/dev/null; then
        echo "skipped: this machine has no $1 for aarch64, and no apt-get to fetch it"
        exit 0
    fi
    mkdir -p "$toolchain"
    rm -rf "$unpacked" "$toolchain/apt"
    # shellcheck disable=SC2086 # words
    if ! { apt update && apt --yes --download-only --no-install-recommends install $2 &&
        { [[ -z $3 ]] || (cd "$archives" && apt download $3); }; }; then
        echo "skipped: this machine has no $1 for aarch64, and apt-get cannot fetch $2 $3"
        exit 0
    fi
    rm -f "$archives"/{libc6,libgcc-s1,libstdc++6}_*.deb
    for archive in "$archives"/*.deb; do
        dpkg --extract "$archive" "$unpacked"
    done
    # Emulators of other processors are most of what is left.
    find "$unpacked" -type f -name 'qemu-*-static' ! -name 'qemu-aarch64-static' -delete
    rm -rf "$toolchain/apt" "$unpacked/usr/share"
    mv "$unpacked" "$toolchain/$1"
}

# wrap NAME FOLDER COMMAND…: $toolchain/bin/NAME runs a command with the libraries of a folder.
wrap() {
    local name=$1 folder=$2
    shift 2
    mkdir -p "$toolchain/bin"
    {
        echo '#!/bin/sh'
        echo "LD_LIBRARY_PATH='$folder/usr/lib/x86_64-linux-gnu' exec ${*@Q} \"\$@\""
    } >"$toolchain/bin/$name"
    chmod +x "$toolchain/bin/$name"
}

has_library() {
    [[ -d $(rustc --print sysroot)/lib/rustlib/$target/lib ]]
}

rust() {
    if has_library; then
        return
    fi
    if [[ ! -d $toolchain/rust ]] && command -v rustup >/dev/null; then
        timeout 120 rustup target add "$target" || echo 'rustup cannot fetch it'
        if has_library; then
            return
        fi
    fi
    fetch rust libstd-rust-web-dev 'rustc-web libstd-rust-web-dev:arm64'
    wrap rustc "$toolchain/rust" "$toolchain/rust/usr/bin/rustc"
    export RUSTC=$toolchain/bin/rustc
}

linker_and_emulator() {
    local gcc=aarch64-linux-gnu-gcc qemu=qemu-aarch64-static
    export QEMU_CPU=max QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
    if ! command -v "$gcc" "$qemu" >/dev/null; then
        local folder=$toolchain/tools
        fetch tools "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static" ''
        wrap "$gcc" "$folder" "$folder/usr/bin/$gcc" --sysroot="$folder"
        gcc=$toolchain/bin/$gcc qemu=$folder/usr/bin/$qemu
        QEMU_LD_PREFIX=$folder$QEMU_LD_PREFIX
    fi
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$gcc
    # What waits for ever under an emulator ends here, and not with the time of all checks.
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="timeout 900 $qemu"
}

cd "$root"
if [[ $(uname -m) != aarch64 ]]; then
    echo '== Rust, linker and emulator'
    rust
    linker_and_emulator
fi

# What is emulated is slow, and so is a compiler that optimizes much.
export CARGO_PROFILE_DEV_OPT_LEVEL=1 CARGO_PROFILE_DEV_DEBUG=0
tiny=tests/golden/tiny
export BESPOKE_MODEL=$tiny/llama-gqa2,$tiny/llama-awq-g32,$tiny/llama-mqa-hd24
cargo=(--locked --target "$target" --no-default-features)

echo '== tests'
features=()
if [[ ${1:-} == --ops ]]; then
    features=(--features ops)
fi
cargo test "${cargo[@]}" "${features[@]}" -p bespoke-aarch64-tests

echo '== a program'
cargo build "${cargo[@]}" -p bespoke
read -ra run <<<"${CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER:-}"
program=("${run[@]}" "$CARGO_TARGET_DIR/$target/debug/bespoke")
"${program[@]}" doctor
targets=$("${program[@]}" kernels --json | grep -o '"target": *"[a-z0-9_]*"' | sort -u)
echo "$targets"
if [[ $(grep -c . <<<"$targets") != 2 || $targets != *neon*portable* ]]; then
    echo 'a program for aarch64 has the kernels of portable and neon' >&2
    exit 1
fi
"${program[@]}" verify
