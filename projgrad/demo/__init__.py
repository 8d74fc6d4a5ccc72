"""The real-data demo: the same forgetting task with OrthoGrad and the baselines, measured and drawn."""
