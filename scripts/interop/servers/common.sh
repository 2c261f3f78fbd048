# What the servers' scripts share. The runner calls `sh NAME.sh VERB` in a directory of that
# server's own, for these verbs:
#
#   install  puts the server below the directory; does nothing if it is there
#   version  prints the installed version
#   start    starts the server on 127.0.0.1, prints `ready ENDPOINT KEY SECRET`, and stops it, with
#            its whole process group, when stdin closes: however the runner ends, no server is left
#
# PORTS holds free ports, and `data` is an empty directory when `start` runs.

set -eu

KEY=AKIAINTEROPEXAMPLE
SECRET=interop/secret+example/0123456789abcdef
PORTS=${PORTS:-}
PORT=${PORTS%% *}

# port N: the N-th free port.
port() { echo "$PORTS" | cut -d' ' -f"$1"; }

need() { command -v "$1" >/dev/null || { echo "$1 is not installed" >&2; exit 1; }; }

# pip_install REQUIREMENT: into a virtual environment here.
pip_install() {
    need python3
    if [ "$(cat installed 2>/dev/null)" != "$1" ]; then
        python3 -m venv venv
        venv/bin/pip install --quiet --disable-pip-version-check "$1"
        echo "$1" >installed
    fi
}

# cargo_install CRATE VERSION [OPTION...]: into this directory. With little optimisation: these are
# long builds, and nobody measures the servers.
cargo_install() {
    need cargo
    export CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off
    export CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=0
    crate=$1 version=$2
    shift 2
    nice cargo install --quiet --locked --root . --target-dir build "$crate" --version "$version" "$@"
    rm -rf build
}

run() {
    case $1 in
    start)
        trap 'kill -KILL 0' EXIT
        trap 'exit 1' HUP INT PIPE TERM # A signal by itself would skip EXIT.
        start >server.log 2>&1
        echo "ready http://127.0.0.1:$PORT $KEY $SECRET"
        cat >/dev/null
        ;;
    *) "$1" ;;
    esac
}
