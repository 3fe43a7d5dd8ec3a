"""Revoked token ids: the one place that says which tokens are no longer good before they expire.

Every way to end a session leads here, in the same transaction as what caused it. Ending the session row itself is the
business of `sessions`.
"""
