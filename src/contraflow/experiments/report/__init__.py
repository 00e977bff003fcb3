"""One page about many runs: `runs` reads folders, `scores` makes returns comparable, `statistics` aggregates them,
`charts` draws them, `tables` arranges them in rows, `page` fills the template `page.html`."""
