"""Pretraining and its evaluations: configs, the loop, and one thin driver per protocol."""
