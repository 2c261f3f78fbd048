#!/usr/bin/env bash
# Builds the release archive: dist/layercache-VERSION-TARGET.tar.gz and SHA256SUMS, for x86-64 Linux with
# glibc 2.17 or newer. `make dist` calls it. Needs python3 and objdump besides Rust's toolchain.
#
# Zig's C compiler and linker can target an old glibc; both come from PyPI, into target/dist-tools.
# The same commit built with the same toolchain gives the same bytes: paths of this machine are remapped,
# and scripts/archive.sh adds nothing of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=x86_64-unknown-linux-gnu
glibc=2.17
tools=target/dist-tools
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)

fail() {
  echo "dist: $1" >&2
  exit 1
}

[[ $(uname -sm) == "Linux x86_64" ]] || fail "runs on x86-64 Linux only: it runs the binary that it builds"
for tool in python3 objdump tar gzip sha256sum; do
  command -v "$tool" >/dev/null || fail "$tool is missing"
done

[[ -x $tools/bin/python ]] || python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check cargo-zigbuild==0.24.1 ziglang==0.17.1

SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
export CARGO_TARGET_DIR=target
export RUSTFLAGS="--remap-path-prefix=$PWD=layercache --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo"
export CFLAGS="-ffile-prefix-map=$PWD=layercache -ffile-prefix-map=${CARGO_HOME:-$HOME/.cargo}=cargo"
PATH=$PWD/$tools/bin:$PATH "${CARGO:-cargo}" zigbuild --release --locked --bin layercache --target "$target.$glibc"
binary=target/$target/release/layercache

# What the binary needs of glibc, its newest version last.
newest=$(objdump -T "$binary" | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1)
[[ $newest == GLIBC_* ]] || fail "objdump finds no glibc version in $binary"
[[ $(printf '%s\n' "$newest" "GLIBC_$glibc" | sort -V | tail -1) == "GLIBC_$glibc" ]] ||
  fail "$binary needs $newest, newer than GLIBC_$glibc"
echo "dist: the newest glibc symbol version that the binary needs is $newest"

scripts/archive.sh "$target" "$binary"
(cd dist && sha256sum "layercache-$version-$target.tar.gz" >SHA256SUMS && cat SHA256SUMS)
