"""Event mode: its batches are those of training, buckets compile once, events depend on their own request only."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_model import random_params, store_config

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.data.packing import pack_row
from wallwm_jax.inference import event_mode
from wallwm_jax.inference.event_mode import EventMode, EventRequest


@pytest.fixture(scope="module")
def store(small_store):
    return open_store(small_store)


def window_request(store, window, **changes):
    record = store.read(window)
    given = EventRequest(
        frames={view: record.picture(view, 0) for view in record.frames},
        state=record.state,
        state_valid=record.state_valid,
        caption=store.caption(record.caption_id),
        duration_s=record.duration_s,
    )
    return dataclasses.replace(given, **changes)


def make(store, batch_size=2, **sampling):
    config = store_config(store, **sampling)
    return EventMode(random_params(config.model), config, store.meta, store.stats, batch_size=batch_size)


@pytest.fixture(scope="module")
def mode(store):
    """Warmed for its two buckets of 2 and 3 latents, that is, up to 16 actions."""
    mode = make(store)
    mode.warm_up()
    assert mode.compilations == 3  # two buckets and the duration head
    yield mode


def test_the_batch_is_the_packed_row_of_training(store):
    """Everything that is known before the event happens stands where the training row has it."""
    config = store_config(store)
    with config.unlocked():
        config.data.update(
            dict(caption_drop=0.0, paraphrase_prob=0.0, duration_clause_prob=0.0, parent_caption_prob=0.0)
        )
    window = int(np.flatnonzero((store.index["kind"] == 0) & (store.index["level"] == 1))[0])
    length, steps = int(store.index[window]["length"]), int(store.index[window]["num_actions"])
    with config.unlocked():
        config.data.update(dict(latents_per_row=length + 2, actions_per_row=8 * (length + 1), events_per_row=1))
    row = pack_row(store, config, [window], 0, store.meta["views"])

    mode = make(store, batch_size=1)
    inputs = mode._inputs([window_request(store, window)], [length - 1], [steps])
    batch = {name: np.asarray(value[0]) for name, value in event_mode._batch(config, inputs, length + 2).items()}
    for name in ("latent_event", "latent_role", "latent_pos", "action_event", "action_pos", "action_valid"):
        np.testing.assert_array_equal(batch[name], row[name], err_msg=name)
    for name in ("text_ids", "text_length", "view_id", "valid_rect", "state_valid"):
        np.testing.assert_array_equal(batch[name], row[name], err_msg=name)
    np.testing.assert_allclose(batch["state"], row["state"], atol=1e-6)
    np.testing.assert_allclose(batch["latents"][:, 0], row["latents"][:, 0], atol=1e-5)
    assert not batch["latents"][:, 1:].any() and not batch["actions"].any()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_programs_can_be_compiled_from_shapes_alone(store, guidance):
    """`program_inputs` is what a request becomes."""
    config = store_config(store, guidance=guidance)
    made = make(store, batch_size=2, guidance=guidance)._inputs([window_request(store, 0)], [1], [8])
    told = event_mode.program_inputs(config, 2, len(store.meta["views"]))
    assert told.pop("seed") == ((2,), np.uint32)  # added when the event is planned
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == told


def test_an_event_fills_the_smallest_bucket_and_ends_at_its_duration(mode, store):
    for seconds, steps, bucket in [(0.05, 2, 2), (0.3, 4, 2), (0.8, 8, 2), (0.9, 10, 3), (1.6, 16, 3), (9.0, 16, 3)]:
        plan = mode.plan([window_request(store, 0, duration_s=seconds)])[0]
        assert (len(plan.actions), plan.bucket, plan.duration_s) == (steps, bucket, seconds)
        assert plan.latents is None and not plan.actions[:, 10:].any()  # one arm


def test_one_compilation_per_bucket_whatever_the_number_of_calls(mode, store):
    before = mode.compilations
    for seconds in (0.2, 0.5, 0.8, 1.0, 1.6, None):
        mode.plan([window_request(store, window, duration_s=seconds) for window in (0, 3, 5)])
    twin = mode.with_params(random_params(mode.config.model, seed=5))
    other = twin.plan([window_request(store, 0)])[0]
    assert mode.compilations == twin.compilations == before
    assert np.abs(other.actions - mode.plan([window_request(store, 0)])[0].actions).max() > 1e-3


def test_a_plan_depends_on_its_own_request_and_seed_only(mode, store):
    alone = mode.plan([window_request(store, 4, duration_s=0.8)], seeds=[7])[0]
    beside = mode.plan(
        [window_request(store, 9, duration_s=1.5), window_request(store, 4, duration_s=0.8)], seeds=[1, 7]
    )
    assert beside[1].bucket == 3 and alone.bucket == 2  # the neighbour is longer
    np.testing.assert_allclose(beside[1].actions, alone.actions, atol=1e-5)
    for changes, seed in [({"caption": "press the red button"}, 7), ({}, 8)]:
        other = mode.plan([window_request(store, 4, duration_s=0.8, **changes)], seeds=[seed])[0]
        assert np.abs(other.actions - alone.actions).max() > 1e-3


def test_without_a_duration_the_model_says_its_own_median(mode, store):
    requests = [window_request(store, window, duration_s=None) for window in (0, 1, 2)]
    quantiles = mode.durations(requests)
    assert quantiles.shape == (3, 3) and (np.diff(quantiles, axis=1) > 0).all()
    assert [plan.duration_s for plan in mode.plan(requests)] == pytest.approx(list(quantiles[:, 1]))
    told = mode.durations([window_request(store, 0, duration_s=3.0)])
    np.testing.assert_allclose(told, quantiles[:1], rtol=1e-6)


def test_predicted_video_starts_with_the_observation(mode, store):
    request = window_request(store, 2, duration_s=1.0)
    plan = mode.plan([request], video=True)[0]
    video = mode.decode(plan)
    for view, frames in video.items():
        assert frames.shape == (1 + 4 * 2, 64, 64, 3) and frames.dtype == np.uint8
        assert np.abs(frames[0].astype(int) - request.frames[view]).max() <= 1
    np.testing.assert_allclose(plan.actions, mode.plan([request])[0].actions, atol=1e-5)


def test_a_video_may_be_predicted_after_the_actions_and_is_the_same(mode, store):
    requests = [window_request(store, number, duration_s=1.0) for number in (1, 2)]
    at_once = mode.plan(requests, seeds=[3, 4], video=True)
    for plan, whole in zip(mode.plan(requests, seeds=[3, 4]), at_once):
        assert plan.latents is None and list(mode.finish(plan)) == list(whole.latents)
        for view, latents in mode.finish(plan).items():
            np.testing.assert_array_equal(latents, whole.latents[view])
    with pytest.raises(ValueError, match="has its video already"):
        mode.finish(at_once[0])


def test_a_view_may_be_absent_and_pictures_may_have_another_size(mode, store):
    request = window_request(store, 2, duration_s=0.8)
    view = store.meta["views"][0]
    plan = mode.plan([dataclasses.replace(request, frames={view: request.frames[view]})], video=True)[0]
    assert list(plan.latents) == [view] and np.isfinite(plan.actions).all()
    large = {name: np.repeat(np.repeat(frame, 2, 0), 2, 1) for name, frame in request.frames.items()}
    same = mode.plan([dataclasses.replace(request, frames=large)])[0]
    np.testing.assert_allclose(same.actions, mode.plan([request])[0].actions, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(frames={}), "none of the views"),
        (dict(frames={"front_pixels": np.zeros((64, 64), np.uint8)}), "expected a .H, W, 3. uint8 picture"),
        (dict(duration_s=0.0), "must be positive"),
        (dict(duration_s=float("nan")), "must be positive"),
    ],
)
def test_bad_requests_are_named(mode, store, changes, message):
    with pytest.raises(UserError, match=message):
        mode.plan([window_request(store, 0, **changes)])


def test_configs_that_cannot_run_are_named(store):
    config = store_config(store, buckets=(2, 40))
    with pytest.raises(UserError, match=r"buckets=\(2, 40\) must lie between 2 and .* = 17"):
        EventMode({}, config, store.meta, store.stats)
    config = store_config(store)
    config.sampling.action_draws = 0
    with pytest.raises(UserError, match="action_draws=0"):
        EventMode({}, config, store.meta, store.stats)
    config = store_config(store)
    config.model.text.kind = "features"
    with pytest.raises(UserError, match="built without one"):
        EventMode({}, config, store.meta, store.stats)


@pytest.mark.extended
def test_the_symmetric_sampler_guidance_and_temperature_are_settings_of_the_same_call(mode, store):
    request = window_request(store, 0, duration_s=0.5)
    other = make(store, buckets=(2,), sampler="symmetric", guidance=2.0, action_temperature=0.0)
    first, second = (other.plan([request], seeds=[seed], video=True)[0] for seed in (0, 1))
    plain, again = (mode.plan([request], seeds=[seed])[0] for seed in (0, 1))
    assert first.actions.shape == plain.actions.shape == (6, 32) and np.isfinite(first.actions).all()
    assert all(latents.shape == (2, 8, 8, 768) for latents in first.latents.values())  # already denoised
    # The mean of draws is steadier than one of them; at temperature 0 only the noise of the video is left.
    mean = make(store, buckets=(2,), action_draws=16)
    one, two = (mean.plan([request], seeds=[seed])[0].actions for seed in (0, 1))
    assert np.abs(one - two).mean() < 0.5 * np.abs(plain.actions - again.actions).mean()
    assert np.abs(first.actions - second.actions).max() < 0.5 * np.abs(plain.actions - again.actions).max()
