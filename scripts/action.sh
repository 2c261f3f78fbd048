#!/usr/bin/env bash
# What action.yml runs: installs a release of layercache, checked against its SHA256SUMS, and runs it.
#
# Inputs are variables: INPUT_MODE, INPUT_CACHE_FROM, INPUT_CACHE_TO, INPUT_PATH, INPUT_VERSION, and
# INPUT_RELEASES, the URL that holds a directory vVERSION for each release. Specs reach the program
# through the environment, not through its command line, which other users of the machine could see.
set -euo pipefail

# GitHub shows it beside the step.
fail() {
  echo "::error title=layercache::$1" >&2
  exit 1
}

target() {
  case $(uname -sm) in
  "Linux x86_64") if compgen -G '/lib/ld-musl-*' >/dev/null; then echo x86_64-unknown-linux-musl; else echo x86_64-unknown-linux-gnu; fi ;;
  "Linux aarch64") echo aarch64-unknown-linux-musl ;;
  "Darwin arm64") echo aarch64-apple-darwin ;;
  "Darwin x86_64") echo x86_64-apple-darwin ;;
  *) fail "there is no release for $(uname -sm)" ;;
  esac
}

download() {
  curl --fail --silent --show-error --location --retry 3 --output "$2" "$1" || fail "cannot download $1"
}

checksum() {
  if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# Leaves the program at $program.
install_release() {
  local name directory expected
  name=layercache-$INPUT_VERSION-$(target)
  directory=$RUNNER_TEMP/$name
  program=$directory/layercache
  # An earlier step of the job may have installed it.
  [[ ! -x $program ]] || return 0
  download "$INPUT_RELEASES/v$INPUT_VERSION/$name.tar.gz" "$directory.tar.gz"
  download "$INPUT_RELEASES/v$INPUT_VERSION/SHA256SUMS" "$directory.sums"
  expected=$(awk -v name="$name.tar.gz" '$2 == name || $2 == "*" name { print $1 }' "$directory.sums")
  [[ -n $expected ]] || fail "SHA256SUMS does not list $name.tar.gz"
  [[ $(checksum "$directory.tar.gz") == "$expected" ]] || fail "$name.tar.gz does not have the checksum in SHA256SUMS"
  tar -xzf "$directory.tar.gz" -C "$RUNNER_TEMP"
  [[ -x $program ]] || fail "$name.tar.gz does not hold $name/layercache"
}

# The results, one a line in $1, as a table for the job's page: at most 20 lines.
summarize() {
  local lines most=14
  lines=$(wc -l <"$1")
  {
    echo "### layercache $INPUT_MODE"
    echo
    echo "| result |"
    echo "|---|"
    head -n "$most" "$1" | sed -e 's/|/\\|/g' -e 's/.*/| & |/'
    if ((lines > most)); then echo "| and $((lines - most)) more |"; fi
  } >>"$GITHUB_STEP_SUMMARY"
}

# Runs the program; its results go to the log and to the job's page.
run() {
  local results=$RUNNER_TEMP/layercache-results status=0
  "$program" "$@" >"$results" || status=$?
  cat "$results"
  summarize "$results"
  return "$status"
}

import() {
  local arguments="--cache-to type=local,dest=$INPUT_PATH,mode=max"
  run import "$INPUT_PATH" || echo "::warning title=layercache::the import failed; building without cache"
  # Older BuildKits fail if there is no such file.
  if [[ -f $INPUT_PATH/index.json ]]; then
    arguments="--cache-from type=local,src=$INPUT_PATH $arguments"
  fi
  echo "build-args=$arguments" >>"$GITHUB_OUTPUT"
}

serve() {
  local log=$RUNNER_TEMP/layercache-serve.log served=$RUNNER_TEMP/layercache-serve.env pid
  : >"$served"
  "$program" serve --env-file "$served" >"$log" 2>&1 </dev/null &
  pid=$!
  for _ in {1..300}; do
    [[ ! -s $served ]] || break
    kill -0 "$pid" 2>/dev/null || fail "serve ended: $(tail -n 1 "$log")"
    sleep 0.1
  done
  [[ -s $served ]] || fail "serve has not begun to listen within 30 s"
  cat "$served" >>"$GITHUB_ENV"
  echo "LAYERCACHE_PID=$pid" >>"$GITHUB_ENV"
  echo "layercache serve listens; its log is $log"
}

[[ -z $INPUT_CACHE_FROM ]] || export LAYERCACHE_CACHE_FROM=$INPUT_CACHE_FROM
[[ -z $INPUT_CACHE_TO ]] || export LAYERCACHE_CACHE_TO=$INPUT_CACHE_TO
INPUT_PATH=${INPUT_PATH:-$RUNNER_TEMP/layercache}
INPUT_VERSION=${INPUT_VERSION#v}
[[ $INPUT_PATH != *[[:space:]]* ]] || fail "path must not contain spaces: $INPUT_PATH"

case $INPUT_MODE in
import | export | serve) install_release ;;
*) fail "mode is import, export or serve, not '$INPUT_MODE'" ;;
esac
case $INPUT_MODE in
import) import ;;
export) run export "$INPUT_PATH" ;;
serve) serve ;;
esac
