"""Signing keys: their states, their files, and the JWKS that publishes them.

`keyring` is pure: a key's state is a function of the list of keys, the clock and the lifetimes. `key_files` reads and
changes the folder, `live` keeps a running process up to date with it, `jwks` renders the public halves, `recording`
tells the audit. What is signed with the keys is the business of `tokens`.
"""
