"""What a run costs on paper: operations, memory and time, without any tensor."""
