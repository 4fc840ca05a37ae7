"""A private certificate authority for tests, made with openssl."""

import ssl
import subprocess


class Authority:
    """Signs certificates; everything is in one folder: ca.crt, and NAME.crt and NAME.key of each."""

    def __init__(self, folder):
        self.folder, self.ca = folder, folder / "ca.crt"
        self._make_ca()

    def _make_ca(self):
        self._make("ca", "-subj", "/CN=test CA", "-addext", "keyUsage=critical,keyCertSign,cRLSign")

    def issue(self, name, names="DNS:localhost,IP:127.0.0.1"):
        """Make a certificate for these names; return the flags of a node that has it."""
        signed = ("-CA", str(self.ca), "-CAkey", str(self.folder / "ca.key"))
        usage = ("-addext", "extendedKeyUsage=serverAuth,clientAuth", "-addext", "basicConstraints=critical,CA:FALSE")
        self._make(name, "-subj", f"/CN={name}", "-addext", f"subjectAltName={names}", *usage, *signed)
        return "--tls-cert", self.folder / f"{name}.crt", "--tls-key", self.folder / f"{name}.key"

    def lock(self, name):
        """Make NAME-locked.key, a copy of its key with a password."""
        key, locked = self.folder / f"{name}.key", self.folder / f"{name}-locked.key"
        lock = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked]
        subprocess.run(lock, check=True, capture_output=True)
        locked.chmod(0o600)

    def renew(self):
        """Take another key for all certificates from now on; trust those of the old one as well until it is dropped."""
        before = self.ca.read_text()
        self._make_ca()
        self._trust(self.ca.read_text() + before)

    def drop_old(self):
        """Trust only the latest key."""
        end = "-----END CERTIFICATE-----\n"
        self._trust(self.ca.read_text().partition(end)[0] + end)

    def _trust(self, certificates):
        new = self.folder / "ca.new"
        new.write_text(certificates)
        new.rename(self.ca)  # whoever reads it finds it whole

    def client(self, name=None):
        """Return an ssl.SSLContext that trusts this authority, and shows the certificate with that name, if any."""
        context = ssl.create_default_context(cafile=self.ca)
        if name:
            context.load_cert_chain(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        return context

    def _make(self, name, *arguments):
        key, cert = self.folder / f"{name}.key", self.folder / f"{name}.crt"
        kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30")
        command = ["openssl", "req", "-x509", *kind, "-keyout", f"{key}.new", "-out", f"{cert}.new", *arguments]
        subprocess.run(command, check=True, capture_output=True)
        key.with_suffix(".key.new").rename(key)
        cert.with_suffix(".crt.new").rename(cert)
