"""One page over many runs: `runs` reads folders, `scores` makes returns comparable, `statistics` aggregates them,
`charts` draws, `page` writes the HTML."""
