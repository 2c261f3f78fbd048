# Ceph's RADOS gateway: one monitor, one OSD in memory, one gateway. The Debian packages are
# unpacked here rather than installed, so neither root nor a running system's Ceph is involved.
. "${0%/*}/common.sh"

LIB=$PWD/root/usr/lib/$(uname -m)-linux-gnu
export LD_LIBRARY_PATH="$LIB:$LIB/ceph:$PWD/root/lib/$(uname -m)-linux-gnu"
export PATH="$PWD/root/usr/bin:$PATH"
export CEPH_CONF="$PWD/ceph.conf"

install() {
    need apt-get
    [ ! -e installed ] || return 0
    mkdir -p debs/partial
    # --reinstall: packages that the system has are wanted here, too.
    apt-get --quiet --quiet --option Debug::NoLocking=1 --option "Dir::Cache::archives=$PWD/debs" \
        install --reinstall --download-only --yes --no-install-recommends radosgw ceph-mon ceph-osd
    for deb in debs/*.deb; do
        dpkg-deb --extract "$deb" root
    done
    radosgw --version >installed
}

version() { sed 's/^ceph version \([^ ]*\) .*/\1/' installed; }

start() {
    fsid=11111111-2222-3333-4444-555555555555
    monitor=v1:127.0.0.1:$(port 2)
    mkdir data/mon data/osd data/run
    cat >ceph.conf <<EOF
[global]
fsid = $fsid
mon host = $monitor
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr2 = false
auth cluster required = none
auth service required = none
auth client required = none
keyring = /dev/null
run dir = $PWD/data/run
log file = $PWD/data/run/\$name.log
mon cluster log file = $PWD/data/run/cluster.log
plugin dir = $LIB/ceph
osd class dir = $LIB/rados-classes
erasure code dir = $LIB/ceph/erasure-code
osd objectstore = memstore
memstore device bytes = 4G
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 1
[mon.a]
mon data = $PWD/data/mon
[osd.0]
osd data = $PWD/data/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$PORT
EOF
    ceph-authtool data/keyring --create-keyring --gen-key --name mon. --cap mon 'allow *'
    monmaptool --create --addv a "[$monitor]" --fsid $fsid data/monmap
    osdmaptool --createsimple 1 data/osdmap
    ceph-mon --id a --mkfs --keyring data/keyring --monmap data/monmap --osdmap data/osdmap
    ceph-mon --id a --foreground &
    ceph-osd --id 0 --mkfs --osd-uuid $fsid --no-mon-config
    ceph-osd --id 0 --foreground --no-mon-config &
    radosgw-admin --no-mon-config user create --uid interop --display-name interop \
        --access-key "$KEY" --secret-key "$SECRET"
    radosgw --name client.rgw --foreground &
}

run "$@"
