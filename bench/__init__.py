"""What `make bench` runs: the project's numbers, each beside the limit it is held against and the peers.

`frame` is how things are measured and shown, `__main__` runs the parts. A part is a module with `measure()`, listed
there: `verifier` is what verifying costs other services. `peers`, which `make bench-peers` runs, has comparable systems
do the same work.
"""
