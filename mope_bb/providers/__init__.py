"""Adapters that ask experts for next-token distributions."""
