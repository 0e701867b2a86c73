#!/bin/sh
# The client: a host in the LAN that knows nothing of ztun. Run as root in the guest, with the repository in /ztun.
set -eu
/ztun/packaging/install-packages curl iputils-ping bind9-dnsutils
/ztun/vagrant/provision/python.sh
PYTHONPATH=/ztun /opt/ztun/bin/python /ztun/vagrant/provision/network.py client
