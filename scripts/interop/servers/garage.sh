# Garage: one node. A long build: 20 minutes and more on two cores.
. "${0%/*}/common.sh"

KEY=GK0123456789abcdef01234567
SECRET=0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef

install() { cargo_install garage 2.5.0 --no-default-features --features bundled-libs,lmdb; }

version() { bin/garage --version | sed 's/^garage \(cargo:\)*\([^ ]*\).*/\2/'; }

start() {
    cat >garage.toml <<EOF
metadata_dir = "data/meta"
data_dir = "data/data"
db_engine = "lmdb"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:$(port 2)"
rpc_public_addr = "127.0.0.1:$(port 2)"
rpc_secret = "$SECRET"

[s3_api]
s3_region = "us-east-1"
api_bind_addr = "127.0.0.1:$PORT"
EOF
    garage() { bin/garage -c garage.toml "$@"; }
    garage server &
    tries=0
    until node=$(garage node id --quiet) && garage status; do
        tries=$((tries + 1))
        [ $tries -lt 100 ]
        sleep 0.2
    done
    garage layout assign --zone here --capacity 1G "${node%@*}"
    garage layout apply --version 1
    garage key import --yes "$KEY" "$SECRET"
    garage key allow --create-bucket "$KEY"
}

run "$@"
