"""wallwm_jax: event-grounded World Action Models, pretrained with JAX on TPU pods."""

__version__ = "0.1.0"
