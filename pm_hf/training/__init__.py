"""One task's training: the perturbed step and what a strategy adds to it."""
