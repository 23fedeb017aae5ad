"""From files and data sets to tasks, and from rows to batches."""
