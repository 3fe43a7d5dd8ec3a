"""The limits: what a core does when it does nothing else. `python -m bench.raw KIND SECONDS` prints a rate."""

import sys
import time
from collections.abc import Callable

from argon2 import PasswordHasher
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256


def signatures() -> Callable[[], object]:
    """Two RSA-2048 signatures, as of an access and a refresh token."""
    key, padding, digest = rsa.generate_private_key(65537, 2048), PKCS1v15(), SHA256()
    access, refresh = b"a" * 700, b"r" * 520
    return lambda: (key.sign(access, padding, digest), key.sign(refresh, padding, digest))


def hashes() -> Callable[[], object]:
    """One Argon2id verification at the cost that the service has by default."""
    hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
    stored = hasher.hash("correct horse battery staple")
    return lambda: hasher.verify(stored, "correct horse battery staple")


def main(kind: str, seconds: float) -> None:
    work = {"signatures": signatures, "hashes": hashes}[kind]()
    for _ in range(3):
        work()
    done, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        work()
        done += 1
    print(done / taken)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
