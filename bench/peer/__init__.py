"""Programs that run beside ours, started by `bench.peers`, two of them in environments without anything of ours."""
