# moto: AWS in Python, for tests. It does not check signatures.
. "${0%/*}/common.sh"

install() { pip_install 'moto[server]==5.2.5'; }

version() { venv/bin/pip show moto | sed -n 's/^Version: //p'; }

start() { venv/bin/moto_server -H 127.0.0.1 -p "$PORT" & }

run "$@"
