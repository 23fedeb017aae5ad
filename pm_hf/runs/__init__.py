"""A stream of tasks from begin to end: the order of things, the folder, what stands in it."""
