"""Files that hold what nobody else may know: secrets and tokens."""

import os

SIZE_MAX = 2**20
SECRET_LEAST = 32  # bytes of each


def read_secret_file(path):
    """Return the secrets in a file, bytes, one per line; ValueError, in words for an operator, if it is not good."""
    secrets = tuple(line.strip() for line in read_private_file(path).splitlines() if line.strip())
    if not secrets:
        raise ValueError(f"{path} is empty")
    if any(len(secret) < SECRET_LEAST for secret in secrets):
        raise ValueError(f"{path}: a secret has at least {SECRET_LEAST} bytes; make one: openssl rand -hex 32")
    return secrets


def read_private_file(path):
    """Return the bytes of a file; ValueError, in words for an operator, if others could read them too.

    Its group may read it only where root gave the file to this process that way: Kubernetes does so with
    secrets, and systemd, by an access list, with credentials.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    given_by_root = status.st_uid == 0 != os.geteuid()
    if status.st_mode & (0o007 if given_by_root else 0o077):
        raise ValueError(f"{path} is open to other users; chmod go= {path}")
    if len(content) > SIZE_MAX:
        raise ValueError(f"{path} is larger than 1 MiB")
    return content
