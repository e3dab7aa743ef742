"""Never twice: features by content, keys and values by everything before them."""
