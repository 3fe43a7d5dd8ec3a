"""The tokens this issuer signs: what they claim, how they are minted, how strictly they are read back.

`jws` is the envelope, `access` and `refresh` the two kinds. Which keys sign is decided in `signing`, whether a token
has been revoked in `revocation` and `sessions`.
"""
