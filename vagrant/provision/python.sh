#!/bin/sh
# A virtual environment with what ztun needs of pip, in /opt/ztun. An image of image/build has it, and tells by the file
# "offline" that nothing can be downloaded; on any other box it is made here, and pip asks its index.
set -eu
/ztun/packaging/install-packages python3 python3-venv iproute2
[ ! -e /opt/ztun/offline ] || exit 0
[ -x /opt/ztun/bin/pip ] || python3 -m venv --system-site-packages /opt/ztun
/opt/ztun/bin/pip install --quiet --disable-pip-version-check /ztun
