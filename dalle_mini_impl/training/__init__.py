"""Training: one loop, a task per model, and what surrounds a run."""
