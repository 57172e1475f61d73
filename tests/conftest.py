"""Shared by all tests: how programs are compiled, and one small event store of synthetic episodes per test run."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Compiling is most of the tests' time: few optimisations halve it, and a program that another test, worker process or
# command under test has compiled is taken from a folder of this run (JAX reads these when it is imported).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="wallwm_test_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from synthetic import synthetic_episode

from wallwm_jax.data.clusters import cluster_store
from wallwm_jax.data.event_store import EventStore, open_store
from wallwm_jax.data.store_writer import StoreOptions, atomic_directory, write_store

_FEW_OPTIMISATIONS = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Parity and what the TPU compiler makes of a program are looked at as users get them: with all optimisations."""
    as_users = any(item.get_closest_marker(name) for name in ("tpu", "parity"))
    jax.config.update("jax_disable_most_optimizations", not as_users and _FEW_OPTIMISATIONS)


def build_small_store(target: Path) -> None:
    """Builds the store of the `small_store` fixture at `target`."""
    with atomic_directory(target, overwrite=False) as directory:
        episodes = (synthetic_episode(seed, steps=64 + 7 * seed) for seed in range(6))
        write_store(directory, episodes, StoreOptions(fixed_steps=16, latent_sample=64))


@pytest.fixture(scope="session")
def small_store(tmp_path_factory) -> Path:
    """Path of a store of 6 synthetic episodes: 64 px, 2 views, subtask and action events, fixed windows of 16 steps.

    Both splits exist (5 episodes train, 1 heldout); clusters are still -1. Copy it before changing anything in it.
    """
    target = tmp_path_factory.mktemp("stores") / "small"
    build_small_store(target)
    return target


@pytest.fixture(scope="session")
def clustered_store(small_store, tmp_path_factory) -> Path:
    """Path of a copy of `small_store` with cluster ids and `clusters.json`. Copy it before changing anything in it."""
    target = tmp_path_factory.mktemp("stores") / "clustered"
    shutil.copytree(small_store, target)
    cluster_store(target)
    return target


@pytest.fixture(scope="session")
def history_store(tmp_path_factory) -> EventStore:
    """A store of 4 synthetic episodes with windows of 24 steps after two latents of history, and subtask events."""
    import history_windows  # needs configs, which not every process that loads this file can import

    target = tmp_path_factory.mktemp("stores") / "history"
    history_windows.build(target)
    return open_store(target)
