"""One page over many runs: `runs` reads folders, `scores` makes returns comparable, `statistics` aggregates them,
`charts` draws them, `tables` puts them into rows, `page` fills the template `page.html`."""
