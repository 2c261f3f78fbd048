# s3s-fs: a directory as S3, the example server of the s3s crate.
. "${0%/*}/common.sh"

install() { cargo_install s3s-fs 0.14.1 --features binary; }

version() { bin/s3s-fs --version | sed 's/^s3s-fs //'; }

start() {
    bin/s3s-fs --host 127.0.0.1 --port "$PORT" --access-key "$KEY" --secret-key "$SECRET" data &
}

run "$@"
