"""The lapilli program: the only room that prints."""
