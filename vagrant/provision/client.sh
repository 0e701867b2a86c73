#!/bin/sh
# The client: a host in the LAN that knows nothing of ztun. Run as root in the guest, with the repository in /ztun.
set -eu
/ztun/packaging/install-packages python3 iproute2 curl iputils-ping bind9-dnsutils
PYTHONPATH=/ztun python3 /ztun/vagrant/provision/network.py client
