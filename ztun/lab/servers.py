"""Configuration and command lines of the real servers in upstream."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ztun.lab import plan, sing_box
from ztun.lab.namespace import run

SOCKS_UDP = "danted" if shutil.which("danted") else "sing-box"
"""The program on plan.SOCKS_UDP_PORT: Debian has had no Dante since 13."""
LARGEST_DATAGRAM = 65_000 if SOCKS_UDP == "danted" else sing_box.LARGEST_DATAGRAM
"""Bytes of payload that it carries either way."""


class Server(NamedTuple):
    """A program to start in upstream, and the TCP ports on UPSTREAM4 that tell when it is there."""

    name: str
    argv: list[str]
    ports: tuple[int, ...]


def servers(directory: Path) -> Iterator[Server]:
    """All servers; writes their configuration below `directory`."""
    yield _dnsmasq(directory)
    yield _nginx(directory)
    yield Server("microsocks", ["microsocks", "-i", "::", "-p", str(plan.SOCKS_PORT)], (plan.SOCKS_PORT,))
    credentials = ["-u", plan.PROXY_USER, "-P", plan.PROXY_PASSWORD]
    auth = ["microsocks", "-i", "::", "-p", str(plan.SOCKS_AUTH_PORT), *credentials]
    yield Server("microsocks-auth", auth, (plan.SOCKS_AUTH_PORT,))
    yield _danted(directory) if SOCKS_UDP == "danted" else _sing_box(directory)
    yield _tinyproxy(directory, plan.HTTP_PROXY_PORT, None)
    yield _tinyproxy(directory, plan.HTTP_PROXY_AUTH_PORT, f"{plan.PROXY_USER} {plan.PROXY_PASSWORD}")
    journal = str(directory / "journal")
    yield Server("peers", [sys.executable, "-m", "ztun.lab.peers", journal], (plan.ECHO_PORT, plan.FIN_FIRST_PORT))
    yield Server("iperf3", ["iperf3", "-s", "-p", str(plan.IPERF_PORT)], (plan.IPERF_PORT,))


def _dnsmasq(directory: Path) -> Server:
    records = [f"host-record={name},{','.join(addresses)}" for name, addresses in plan.NAMES.items()]
    wildcards = [f"address=/{plan.BULK_DOMAIN}/{address}" for address in (plan.SITE4, plan.SITE6)]
    listen = [plan.UPSTREAM4, plan.UPSTREAM6, plan.RESOLVER_ELSEWHERE4, plan.RESOLVER_ELSEWHERE6, "127.0.0.1"]
    lines = [
        "no-resolv",
        "no-hosts",
        "user=root",
        "keep-in-foreground",
        "bind-interfaces",
        "local=/test/",
        "local-ttl=60",
        "cname=alias.test,direct.test",
        "txt-record=direct.test,lab",
        *(f"txt-record=big.test,{number:02d}-{'x' * 196}" for number in range(20)),  # 4 KB: fits TCP only
        "dns-rr=direct.test,65,00:01:00:00:01:00:03:02:68:32",  # RFC 9460: 1 ., alpn="h2"
        "log-queries",
        f"log-facility={directory / 'dnsmasq.log'}",
        f"pid-file={directory / 'dnsmasq.pid'}",
        *(f"listen-address={address}" for address in listen),
        *records,
        *wildcards,
    ]
    path = directory / "dnsmasq.conf"
    path.write_text("\n".join(lines) + "\n")
    return Server("dnsmasq", ["dnsmasq", f"--conf-file={path}"], (53,))


_NGINX = """daemon off;
user root;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 100000;
    default_type text/plain;
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    server {{
        listen {http} backlog=4096;
        listen [::]:{http} backlog=4096;
        listen {https} ssl;
        listen [::]:{https} ssl;
        ssl_certificate {directory}/lab.crt;
        ssl_certificate_key {directory}/lab.key;
        location / {{
            return 200 '{{"client": "$remote_addr", "host": "$host", "server": "$server_addr"}}\\n';
        }}
        location /files/ {{ alias {directory}/files/; }}
    }}
}}
"""


def _nginx(directory: Path) -> Server:
    (directory / "files").mkdir()
    subject = ["-subj", "/CN=secure.test", "-addext", "subjectAltName=DNS:secure.test,DNS:site.test"]
    keys = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(directory / "lab.key")]
    run(["openssl", "req", "-x509", *keys, "-days", "2", *subject, "-out", str(directory / "lab.crt")])
    path = directory / "nginx.conf"
    path.write_text(_NGINX.format(directory=directory, http=plan.HTTP_PORT, https=plan.HTTPS_PORT))
    argv = ["nginx", "-p", str(directory), "-e", str(directory / "nginx-error.log"), "-c", str(path)]
    return Server("nginx", argv, (plan.HTTP_PORT, plan.HTTPS_PORT))


_DANTED = """\
errorlog: {directory}/danted-error.log
logoutput: {directory}/danted.log
internal: {address} port = {port}
external: {address}
external: {address6}
clientmethod: none
socksmethod: none
user.privileged: root
user.unprivileged: root
client pass {{ from: 0/0 to: 0/0 }}
socks pass {{ from: 0/0 to: 0/0 }}
"""


def _danted(directory: Path) -> Server:
    path = directory / "danted.conf"
    port = plan.SOCKS_UDP_PORT
    path.write_text(_DANTED.format(directory=directory, address=plan.UPSTREAM4, address6=plan.UPSTREAM6, port=port))
    argv = ["danted", "-N", "1", "-f", str(path), "-p", str(directory / "danted.pid")]
    return Server("danted", argv, (port,))


def _sing_box(directory: Path) -> Server:
    port = plan.SOCKS_UDP_PORT
    return Server("sing-box", sing_box.command(directory, plan.UPSTREAM4, port), (port,))


def _tinyproxy(directory: Path, port: int, credentials: str | None) -> Server:
    lines = [f"Port {port}", "User root", "Group root", "Timeout 600", "MaxClients 500"]
    lines += ["DisableViaHeader Yes", f'LogFile "{directory}/tinyproxy-{port}.log"', "LogLevel Warning"]
    if credentials:
        lines.append(f"BasicAuth {credentials}")
    path = directory / f"tinyproxy-{port}.conf"
    path.write_text("\n".join(lines) + "\n")
    return Server(f"tinyproxy-{port}", ["tinyproxy", "-d", "-c", str(path)], (port,))
