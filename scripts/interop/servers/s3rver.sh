# s3rver: a fake S3 in JavaScript, for tests. Its one key pair is built in.
. "${0%/*}/common.sh"

KEY=S3RVER
SECRET=S3RVER

install() {
    need npm
    npm install --silent --no-fund --no-audit --prefix . s3rver@3.7.1
}

version() { node_modules/.bin/s3rver --version; }

start() {
    # The cipher of its listings' tokens is gone from OpenSSL 3.
    export NODE_OPTIONS=--openssl-legacy-provider
    node_modules/.bin/s3rver --directory data --address 127.0.0.1 --port "$PORT" --no-vhost-buckets &
}

run "$@"
