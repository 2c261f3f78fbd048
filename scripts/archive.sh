#!/usr/bin/env bash
# archive.sh TARGET BINARY packs a release archive, dist/layercache-VERSION-TARGET.tar.gz: the binary, its
# completions and man pages, LICENSE, README and CHANGELOG. The binary must run on this machine.
#
# The same binary and commit give the same bytes: names are sorted, there are no owners, and times are
# the commit's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=$1
binary=$2
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
name=layercache-$version-$target
time=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
# On macOS the GNU one comes from Homebrew, and runners have it.
tar=$(command -v gtar || command -v tar)

stage=target/dist/$name
rm -rf target/dist
mkdir -p "$stage/completions" "$stage/man" dist
cp LICENSE README.md CHANGELOG.md "$stage"
cp "$binary" "$stage/layercache"
"$binary" completion bash >"$stage/completions/layercache.bash"
"$binary" completion zsh >"$stage/completions/_layercache"
"$binary" completion fish >"$stage/completions/layercache.fish"
"$binary" completion elvish >"$stage/completions/layercache.elv"
"$binary" completion powershell >"$stage/completions/_layercache.ps1"
"$binary" man "$stage/man"

"$tar" --create --format=ustar --directory target/dist --sort=name --owner=0 --group=0 --numeric-owner \
  --mode='u=rwX,go=rX' --mtime="@$time" "$name" | gzip -9 -n >"dist/$name.tar.gz"
