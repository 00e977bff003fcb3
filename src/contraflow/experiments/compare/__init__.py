"""A matrix of agents, environments and seeds: `matrix` says what it consists of and what is done, `worker` trains
one cell, or several seeds at once, in a process of its own, `runner` keeps such workers going, on this machine or as
tasks of Ray, `board` shows them."""
