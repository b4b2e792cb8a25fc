"""Reward models: who says how far an answer takes a dimension, and what that means against a reference answer."""
