#!/bin/sh
# The internet: real servers on the addresses of ztun/lab/plan.py. Run as root in the guest, the repository in /ztun.
set -eu
/ztun/packaging/install-packages openssl '?dante-server' microsocks tinyproxy dnsmasq-base \
    nginx-light iperf3 nftables
/ztun/vagrant/provision/python.sh
PYTHONPATH=/ztun /opt/ztun/bin/python /ztun/vagrant/provision/network.py upstream
cat > /etc/systemd/system/lab.service <<'UNIT'
[Unit]
Description=the servers of ztun's laboratory
Wants=network-online.target
After=network-online.target

[Service]
Environment=PYTHONPATH=/ztun
ExecStart=/opt/ztun/bin/python /ztun/vagrant/provision/serve.py
RuntimeDirectory=lab
Restart=on-failure
LimitNOFILE=65536

[Install]
WantedBy=multi-user.target
UNIT
systemctl daemon-reload
systemctl enable -q lab
systemctl restart lab
