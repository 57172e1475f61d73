"""Small layers that every tower shares: linear maps, norms, modulation, timestep features, the time embedding.

Parameters are float32. A linear map computes in the module's compute dtype; norms and modulation compute in float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from wallwm_jax.parallel.mesh import ROW_AXES
from wallwm_jax.parallel.sharding import spec_for

NORM_EPS = 1e-6
MAX_PERIOD = 10000.0
_SUBLANES = 8  # rows of a TPU register: the least that goes through its matrix unit


class Linear(nnx.Module):
    """`x @ kernel + bias`, kernel `[in, out]`, computed in `dtype`.

    `std` is the standard deviation of the initial kernel: None gives 1 / sqrt(in), 0 gives zeros. `bias` can be absent.
    `axes` are the kernel's logical axes, where they are known, `rows` the axis of the input that a mesh splits by rows
    (both by `param_axes.name_axes`); see `affine`.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        std: float | None = None,
        bias: bool = True,
    ):
        std = 1.0 / math.sqrt(fan_in) if std is None else std
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (fan_in, fan_out), jnp.float32) * std)
        self.bias = nnx.Param(jnp.zeros((fan_out,), jnp.float32)) if bias else None
        self.dtype = dtype
        self.axes: tuple[str, str] | None = None
        self.rows = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        return affine(_PLAIN, self._layout(), x.astype(self.dtype), *self._weights())

    def to_heads(self, x: jax.Array, heads: int, name: str = "projection") -> jax.Array:
        """`[..., S, in]` to `[..., heads, S, out / heads]`, written where an attention reads it; kept by `name`, see
        `layer_stack.REMAT`."""
        kernel, bias = self._weights()
        kernel, bias = kernel.reshape(len(kernel), heads, -1), bias.reshape(heads, 1, -1)
        return checkpoint_name(affine(_TO_HEADS, self._layout(), x.astype(self.dtype), kernel, bias), name)

    def from_heads(self, x: jax.Array) -> jax.Array:
        """`[..., H, S, in / H]` to `[..., S, out]`."""
        kernel, bias = self._weights()
        kernel = kernel.reshape(x.shape[-3], x.shape[-1], -1)
        return checkpoint_name(affine(_FROM_HEADS, self._layout(), x.astype(self.dtype), kernel, bias), "projection")

    def _layout(self) -> Layout | None:
        return Layout(self.axes, self.rows) if self.axes else None

    def _weights(self) -> tuple[jax.Array, jax.Array]:
        bias = jnp.zeros(self.kernel.shape[1:]) if self.bias is None else self.bias[...]
        return self.kernel[...].astype(self.dtype), bias.astype(self.dtype)


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
        return checkpoint_name(self.down(jax.nn.gelu(checkpoint_name(self.up(x), "ffn"), approximate=True)), "ffn")


class GatedFeedForward(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, bias: bool = True):
        self.gate = Linear(width, hidden, rngs=rngs, dtype=dtype, bias=bias)
        self.up = Linear(width, hidden, rngs=rngs, dtype=dtype, bias=bias)
        self.down = Linear(hidden, width, rngs=rngs, dtype=dtype, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (checkpoint_name(part(x), "ffn") for part in (self.gate, self.up))
        return checkpoint_name(self.down(jax.nn.silu(gate) * up), "ffn")


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


class _Form(NamedTuple):
    """Axes of a linear map in einsum's letters, those of its bias too; `?` are the leading axes, of any number. `split`
    are those of the kernel that a mesh may split, one of its input and one of its output."""

    x: str
    kernel: str
    y: str
    bias: str
    split: str

    def einsum(self, form: str, left: jax.Array, right: jax.Array, leading: str, **kwargs: Any) -> jax.Array:
        return jnp.einsum(form.replace("?", leading), left, right, **kwargs)

    def leading(self, x: jax.Array) -> str:
        return "ABCDEF"[: x.ndim - len(self.x) + 1]


_PLAIN = _Form("?i", "io", "?o", "o", "io")
_TO_HEADS = _Form("?si", "ihd", "?hsd", "hd", "ih")
_FROM_HEADS = _Form("?hsd", "hdo", "?so", "o", "ho")


class Layout(NamedTuple):
    """How a mesh splits a linear map: logical axes of its kernel `[in, out]`; the axis of its input that are rows."""

    axes: tuple[str, str]
    rows: int = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def affine(form: _Form, layout: Layout | None, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`x @ kernel + bias` over the axes that `form` names; `bias` broadcasts to the result.

    Its own derivative fixes how the parameters' gradients are computed, as products that accumulate in float32: JAX's
    default makes XLA's CPU backend copy a transposed gradient for every kernel, and its TPU backend sum the gradient of
    a bias in the compute dtype, several times slower than it reads it. The gradient of a kernel whose `layout` is known
    is scattered as the kernel is split; left to the compiler, some chips sum it whole.
    """
    return form.einsum(f"{form.x},{form.kernel}->{form.y}", x, kernel, form.leading(x)) + bias


def _affine_forward(
    form: _Form, layout: Layout | None, x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return affine(form, layout, x, kernel, bias), (x, kernel, bias)


def _affine_backward(
    form: _Form, layout: Layout | None, saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel, bias = saved
    einsum = functools.partial(form.einsum, leading=form.leading(x))
    of_x = einsum(f"{form.y},{form.kernel}->{form.x}", gradient, kernel)
    of_kernel = _of_kernel(form, layout, kernel.shape, bias.size, x, gradient)
    letters = form.y.replace("?", form.leading(x))
    tokens = {axis: size for axis, size in zip(letters, gradient.shape) if axis not in form.bias}
    ones = jnp.ones((_SUBLANES, *tokens.values()), gradient.dtype)
    sums = f"k{''.join(tokens)},{form.y}->k{form.bias}"
    of_bias = jnp.mean(einsum(sums, ones, gradient, preferred_element_type=jnp.float32), 0).reshape(bias.shape)
    return of_x, of_kernel.astype(kernel.dtype), of_bias.astype(bias.dtype)


def _of_kernel(
    form: _Form, layout: Layout | None, shape: tuple[int, ...], fan_out: int, x: jax.Array, gradient: jax.Array
) -> jax.Array:
    """The gradient of a kernel of that shape, float32."""

    def product(x: jax.Array, gradient: jax.Array) -> jax.Array:
        sizes = f"{form.x},{form.y}->{form.kernel}"
        return form.einsum(sizes, x, gradient, form.leading(x), preferred_element_type=jnp.float32)

    def whole() -> jax.Array:
        """Left to the compiler. A TPU writes a product with its longer side innermost, and scatters nothing along that,
        so where the output is the shorter side, it stays one axis."""
        if form is not _TO_HEADS or shape[0] <= fan_out:
            return product(x, gradient)
        flat = jnp.moveaxis(gradient, -3, -2).reshape(*x.shape[:-1], -1)
        of_kernel = _PLAIN.einsum("?i,?o->io", x, flat, _PLAIN.leading(x), preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(of_kernel).reshape(shape)

    mesh = jax.sharding.get_abstract_mesh()
    flat = (math.prod(shape) // fan_out, fan_out)
    split = _split(layout, flat, mesh)
    scattered = [dimension for dimension, names in enumerate(split) if "fsdp" in names]
    if layout is None or not scattered or len(form.leading(x)) <= layout.rows or "tensor" in split[scattered[0]]:
        return whole()
    sizes = {letter: shape[form.kernel.index(letter)] for letter, names in zip(form.split, split) if "tensor" in names}
    parts = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if x.shape[layout.rows] % parts or any(size % mesh.shape["tensor"] for size in sizes.values()):
        return whole()

    def on_device(x: jax.Array, gradient: jax.Array) -> jax.Array:
        own = product(x, gradient)
        own = own.reshape([-1 if "tensor" in names else size for size, names in zip(flat, split)])
        own = jax.lax.psum_scatter(own, "fsdp", scatter_dimension=scattered[0], tiled=True)
        copies = tuple(axis for axis in ROW_AXES if axis != "fsdp" and mesh.shape[axis] > 1)
        return jax.lax.psum(own, copies) if copies else own

    def spec(letters: str) -> PartitionSpec:
        """Of tokens: their rows are split, and features that `tensor` splits in the kernel."""
        names = letters.replace("?", form.leading(x))
        of_letter = dict.fromkeys(sizes, "tensor") | {names[layout.rows]: ROW_AXES}
        return PartitionSpec(*(of_letter.get(letter) for letter in names))

    summed = jax.shard_map(
        on_device,
        in_specs=(spec(form.x), spec(form.y)),
        out_specs=PartitionSpec(*(tuple(name for name in names if name != "context") or None for names in split)),
        axis_names={axis for axis in mesh.axis_names if axis != "context" or mesh.shape[axis] == 1},
        check_vma=False,
    )(x, gradient)
    return summed.reshape(shape)


def _split(layout: Layout | None, shape: tuple[int, int], mesh: jax.sharding.AbstractMesh) -> list[tuple[str, ...]]:
    """The mesh axes that split each dimension of a kernel; none where its layout is not known."""
    if layout is None or mesh.empty:
        return [(), ()]
    return [(names,) if isinstance(names, str) else names or () for names in spec_for(layout.axes, shape, mesh)]


affine.defvjp(_affine_forward, _affine_backward)


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


def settled(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in `dtype`, written to memory once: a TPU would compute what makes it again for every tile of the products
    that read it, or copy it in float32 where its layout changes."""
    return jax.lax.optimization_barrier(x.astype(dtype))


def gated(x: jax.Array, update: jax.Array, gate: jax.Array) -> jax.Array:
    """`x + gate * update`, summed in float32, in the dtype of `x`."""
    return (x.astype(jnp.float32) + gate * update.astype(jnp.float32)).astype(x.dtype)
