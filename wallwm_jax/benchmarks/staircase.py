"""Staircase Decoding beside decoding as many tokens in turn: layers one after the other, work, time on this machine.

Layers and work are counted in the compiled programs, per call: the staircase's latents in one pass, and the same number
of tokens, each through all layers of the same branch behind the same text. A layer is the last product of its
feed-forward, counted as often as the loops around it run; all of them follow each other. Parameters are random.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wallwm_jax.benchmarks.timing import Result, Seconds, machine, machine_line
from wallwm_jax.console import phase
from wallwm_jax.models.vlm import language_model, staircase
from wallwm_jax.models.vlm.config import LanguageConfig
from wallwm_jax.models.vlm.language_model import Cache
from wallwm_jax.models.vlm.staircase import StaircaseConfig
from wallwm_jax.parallel.aot import count_instructions

_TEXT = 128  # tokens of the text that the latents stand behind


def measure(steps: int = 20, *, depth: int = 32, latents: int = 8, spacing: int = 4, width: int = 128) -> Result:
    """Counts and times both ways.

    Args:
      steps: timed calls.
      depth, width: of the backbone, Qwen3.5's layout.
      latents, spacing: of the staircase.
    """
    language = LanguageConfig.tiny(depth=depth, width=width, ffn=3 * width)
    config = StaircaseConfig.stairs(latents, width, width, spacing)
    with phase("random parameters"):
        branch = jax.jit(lambda: _branch(config, language))()
        cache = language_model.empty_cache(language, 1, _TEXT + latents)._replace(used=jnp.asarray(_TEXT, jnp.int32))
    result: Result = {
        "machine": machine(),
        "depth": depth,
        "width": width,
        "latents": latents,
        "spacing": spacing,
        "calls": steps,
    }
    for name, function in ways(config, language).items():
        with phase(f"{name}: compile and 1 + {steps} calls"):
            result[name] = _measure(function, branch, cache, steps, language)
    return result


def table(result: Result) -> str:
    """The figures as lines for people."""
    once, turn = result["staircase"], result["in_turn"]
    return "\n".join(
        [
            machine_line(result["machine"]),
            f"{result['latents']} latents, {result['depth']} layers of width {result['width']}, a stair every "
            f"{result['spacing']}",
            f"{'':<12}{'layers in a row':>17}{'GFLOP':>9}{'p50 ms':>9}",
            *(
                f"{name:<12}{row['layer_steps']:>17}{row['flops'] / 1e9:>9.3f}{1e3 * row['seconds']['median']:>9.1f}"
                for name, row in (("staircase", once), ("in turn", turn))
            ),
            f"work         {once['flops'] / turn['flops']:.3f} of that in turn",
        ]
    )


def ways(config: StaircaseConfig, language: LanguageConfig) -> dict[str, Callable[[Any, Cache], jax.Array]]:
    """Functions of (branch, cache): "staircase", and "in_turn", which feeds each position's state to the next one."""

    def in_turn(branch: Any, cache: Cache) -> jax.Array:
        params = {**branch, "norm": branch["border"]["norm"]}
        start = jnp.broadcast_to(branch["border"]["start"], (len(cache.position), 1, language.width))
        start = start.astype(language.compute_dtype)

        def step(_: Any, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
            return language_model.extend(params, language, carry[0], carry[1])

        return jax.lax.fori_loop(0, len(config.entry_depths), step, (start, cache))[0]

    return {"staircase": lambda branch, cache: staircase.decode(branch, config, language, cache), "in_turn": in_turn}


def _branch(config: StaircaseConfig, language: LanguageConfig) -> Any:
    key = jax.random.key(0)
    return staircase.init(config, language, language_model.init(language, key), key)


def _measure(
    function: Callable[..., jax.Array], branch: Any, cache: Cache, steps: int, language: LanguageConfig
) -> Result:
    compiled = jax.jit(function).lower(branch, cache).compile()
    call, seconds = functools.partial(compiled, branch, cache), []
    for _ in range(1 + steps):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begun)
    counted = count_instructions(compiled.as_text() or "")
    return {
        "layer_steps": counted.products[language.ffn, language.width],
        "flops": counted.flops,
        "seconds": Seconds.of(seconds[1:]).to_json(),
    }
