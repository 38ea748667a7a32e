"""Both sides of a comparison: the weights they share, the child processes they run in, the figures."""
