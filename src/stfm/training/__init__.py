"""Training: recipes, batches, schedules and ``fit``, on slides."""
