"""Decoding modes, samplers, policy."""
