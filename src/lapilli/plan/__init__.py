"""Cost of a run on paper: operations, memory and time, without any tensor."""
