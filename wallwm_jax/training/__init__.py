"""Stages, train step, state, checkpoints, telemetry."""
