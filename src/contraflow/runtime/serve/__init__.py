"""A server of actions for robots and benchmarks: `contraflow serve`, or `running(policy)` in a program."""
