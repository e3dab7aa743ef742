"""Training: recipes, data, losses, the loop; the model and its files are made elsewhere."""
