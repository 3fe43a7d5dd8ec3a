"""What `make bench` runs: the project's numbers, each beside the limit it is held against and the peers.

`frame` is how things are measured and shown, `__main__` runs the parts. A part is a module with `measure()`, listed
there: `serving` is what the service does at its limits, `verifier` what verifying costs other services, `transfer` what
moving in does. Two take longer and more than the rest, and are run by themselves: `peers` has comparable systems do the
same work (`make bench-peers`), `scale` has ten times as many sessions (`make bench-scale`). `pictures` draws what they
wrote down, and `profile` looks where the time of a refresh goes.
"""
