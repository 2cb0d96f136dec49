"""Certificates for servers of tests."""

import ssl
from pathlib import Path

import trustme

NAMES = ("localhost", "127.0.0.1")


class Certificates:
    """A certificate authority and one server certificate by it, as files in a folder.

    The certificate is for ``localhost`` and ``127.0.0.1``. ``other_ca`` is an authority that has
    nothing to do with it. The key is readable for its owner alone; servers get their own copy.
    """

    def __init__(self, folder: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        issued = authority.issue_cert(*NAMES)
        self.ca = folder / "ca.pem"
        self.other_ca = folder / "other-ca.pem"
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        authority.cert_pem.write_to_path(str(self.ca))
        other.cert_pem.write_to_path(str(self.other_ca))
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.key.touch(mode=0o600)
        self.key.write_bytes(issued.private_key_pem.bytes())

    def client_context(self) -> ssl.SSLContext:
        """Return a context that trusts the authority alone, and checks the name."""
        return ssl.create_default_context(cafile=str(self.ca))

    def server_context(self) -> ssl.SSLContext:
        """Return a context that shows the certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key)
        return context
