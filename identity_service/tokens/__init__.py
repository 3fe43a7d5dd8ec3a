"""The tokens this issuer signs: what they claim, how they are minted, how strictly they are read back.

`jws` is the envelope, `access`, `refresh` and `cursors` are the kinds, `rounds` signs several in one go. Which keys
sign is decided in `signing`, whether a token has been revoked in `revocation` and `sessions`.
"""
