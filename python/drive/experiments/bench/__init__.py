"""`drive bench` and `drive sparse-bench`: times of a step and of sparse layers, beside their rivals."""
