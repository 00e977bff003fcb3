"""A matrix of agents, environments and seeds: `matrix` says what it consists of and what is done, `worker` trains one
cell, or several seeds at once, in a process of its own, `pool` keeps as many of those at work as asked, `on_ray` leaves
that to a Ray cluster, `board` shows them."""
