"""Training: recipes, data, the trainer, and several processes that train one model."""
