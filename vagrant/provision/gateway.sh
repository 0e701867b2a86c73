#!/bin/sh
# The gateway: ztun installed as the README says. Run as root in the guest, with the repository in /ztun.
# Without an image of image/build the packages come from Debian and the dependencies from pip's index.
set -eu
/ztun/packaging/install-packages python3-bpfcc linux-libc-dev bpftool nftables
/ztun/vagrant/provision/python.sh
PYTHONPATH=/ztun /opt/ztun/bin/python /ztun/vagrant/provision/network.py gateway

package=/ztun
for wheel in /ztun-wheel/*.whl; do
    [ ! -e "$wheel" ] || package=$wheel # of the same sources
done
offline=
[ ! -e /opt/ztun/offline ] || offline='--no-index --no-build-isolation'
# shellcheck disable=SC2086 # two words or none
/opt/ztun/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps $offline "$package"
ln -sf /opt/ztun/bin/ztun /usr/local/bin/ztun

install -m 644 /ztun/packaging/ztun.service /etc/systemd/system/ztun.service
install -d /etc/ztun
[ -e /etc/ztun/config.json ] || install -m 600 /ztun/vagrant/provision/config.json /etc/ztun/config.json
if [ "$(systemd-detect-virt)" = qemu ]; then
    # Without hardware virtualisation all takes some fifteen times as long, and more on a busy host.
    mkdir -p /etc/systemd/system/ztun.service.d
    printf '[Service]\nTimeoutStartSec=900\nTimeoutStopSec=300\nWatchdogSec=300\n' \
        > /etc/systemd/system/ztun.service.d/emulated.conf
fi
systemctl daemon-reload
systemctl enable -q ztun
systemctl restart ztun
