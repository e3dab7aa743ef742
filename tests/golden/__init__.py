"""Golden data: a copy of the numbers of the original, so that the tests run without ../shared."""
