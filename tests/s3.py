"""The S3 server of the tests: that of the benchmarks, over TLS too, with a certificate authority of its own."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobs.bench import s3_server
from jobs.bench.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, free_ports, running

__all__ = ["ACCESS_KEY", "BUCKET", "SECRET_KEY", "Server", "free_ports", "running"]


@dataclass
class Server(s3_server.Server):
    """The server's process, whose fifth port speaks TLS."""

    @property
    def tls_environment(self) -> dict[str, str]:
        """What differs for a client that comes over TLS, and has to be told of the server's own authority."""
        return {"AWS_ENDPOINT_URL": f"https://127.0.0.1:{self.ports[4]}", "AWS_CA_BUNDLE": f"{self.folder}/tls.pem"}

    def more_options(self) -> list[str]:
        if not (self.folder / "tls.pem").exists():
            _write_certificate(self.folder)
        key = f"-s3.key.file={self.folder}/tls.key"
        return [f"-s3.port.https={self.ports[4]}", f"-s3.cert.file={self.folder}/tls.pem", key]


def _write_certificate(folder: Path) -> None:
    """`tls.pem` (the server's certificate and that of the authority that signed it) and `tls.key`."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("test authority", "127.0.0.1")]
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    root = x509.BasicConstraints(ca=True, path_length=None)
    certificates = []
    for name, owner, extension in ((names[1], key, address), (names[0], authority, root)):
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(names[0]).public_key(owner.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day)
        builder = builder.not_valid_after(now + day).add_extension(extension, critical=True)
        certificates.append(builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    (folder / "tls.pem").write_bytes(b"".join(certificates))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "tls.key").write_bytes(key.private_bytes(*plain))
