"""Small layers that every tower shares: linear maps, norms, modulation, timestep features, the time embedding.

Parameters are float32. A linear map computes in the module's compute dtype; norms and modulation compute in float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

NORM_EPS = 1e-6
MAX_PERIOD = 10000.0


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel `[in, out]`, computed in `dtype`.

    `std` is the standard deviation of the initial kernel: None gives 1 / sqrt(in), 0 gives zeros.
    """

    def __init__(self, fan_in: int, fan_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, std: float | None = None):
        std = 1.0 / math.sqrt(fan_in) if std is None else std
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (fan_in, fan_out), jnp.float32) * std)
        self.bias = nnx.Param(jnp.zeros((fan_out,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return product(x.astype(self.dtype), self.kernel[...].astype(self.dtype)) + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias over the last axis, in float32."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x) * self.scale[...] + self.bias[...]


class RMSNorm(nnx.Module):
    """Root-mean-square norm with scale over the last axis (all heads together, as Wan normalises q and k)."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPS) * self.scale[...]


class FeedForward(nnx.Module):
    """Wan's feed-forward: up, tanh-approximated GELU, down."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.up = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.down = Linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class GatedFeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.gate = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.up = Linear(width, hidden, rngs=rngs, dtype=dtype)
        self.down = Linear(hidden, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class TimeEmbedding(nnx.Module):
    """Timesteps to (embedding `[..., D]`, modulation `[..., M, D]`), both float32, by Wan's time MLP and projection.

    `std` is the standard deviation of the projection's initial kernel.
    """

    def __init__(self, freq_dim: int, width: int, modulations: int, *, rngs: nnx.Rngs, std: float):
        self.freq_dim, self.modulations = freq_dim, modulations
        self.up = Linear(freq_dim, width, rngs=rngs, dtype=jnp.float32)
        self.down = Linear(width, width, rngs=rngs, dtype=jnp.float32)
        self.projection = Linear(width, modulations * width, rngs=rngs, dtype=jnp.float32, std=std)

    def __call__(self, timestep: jax.Array) -> tuple[jax.Array, jax.Array]:
        embedding = self.down(jax.nn.silu(self.up(timestep_features(timestep, self.freq_dim))))
        modulation = self.projection(jax.nn.silu(embedding))
        return embedding, modulation.reshape(*timestep.shape, self.modulations, -1)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [..., in] @ kernel [in, out]`.

    Its own derivative only fixes the order of the kernel gradient's product: JAX's default makes XLA's CPU backend copy
    a transposed gradient for every kernel.
    """
    return x @ kernel


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    flat = (x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1]))
    of_kernel = jax.lax.dot_general(*flat, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return gradient @ kernel.T, of_kernel.astype(kernel.dtype)


product.defvjp(_product_forward, _product_backward)


def timestep_features(timestep: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal features `[..., dim]` of a timestep in [0, 1000]: cosines, then sines, periods up to 10000 steps."""
    half = dim // 2
    frequency = jnp.exp(-math.log(MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = timestep.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer norm over the last axis without scale and bias, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + NORM_EPS)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """AdaLN: `layer_norm(x) * (1 + scale) + shift`, in float32."""
    return layer_norm(x) * (1.0 + scale) + shift


def gated(x: jax.Array, update: jax.Array, gate: jax.Array) -> jax.Array:
    """`x + gate * update`, summed in float32, in the dtype of `x`."""
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
