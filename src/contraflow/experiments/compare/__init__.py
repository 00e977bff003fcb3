"""A matrix of agents, environments and seeds. `matrix` defines its cells and their state, `worker` trains one cell, or
several seeds at once, in a separate process, `runner` runs such workers on this machine or as tasks of Ray, and `board`
shows their progress."""
