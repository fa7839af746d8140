"""Systems measured in turn, a process each."""
