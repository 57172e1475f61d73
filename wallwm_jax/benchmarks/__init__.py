"""What `python -m wallwm_jax.benchmark` measures, one module per part."""
