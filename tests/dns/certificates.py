"""Self-made certificates for servers in tests."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


class Certificate:
    """A key and a certificate for these names and addresses, signed by itself."""

    def __init__(self, directory: Path, *subjects: str) -> None:
        self.key, self.chain = directory / "key.pem", directory / "chain.pem"
        names = ",".join(
            f"{'IP' if subject[0].isdigit() or ':' in subject else 'DNS'}:{subject}" for subject in subjects
        )
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
            f" -addext subjectAltName={names} -keyout {self.key} -out {self.chain}".split(),
            check=True,
            capture_output=True,
        )

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.chain, self.key)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Trusts this certificate and no other."""
        return ssl.create_default_context(cafile=str(self.chain))
