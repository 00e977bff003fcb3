"""One page over many runs: `runs` reads folders, `scores` makes returns comparable, `statistics` aggregates them,
`charts` draws returns and `inside` diagnostics, `page` writes the HTML."""
