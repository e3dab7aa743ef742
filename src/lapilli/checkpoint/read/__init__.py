"""Reading a checkpoint: what its directory says, which tensor is for which parameter."""
