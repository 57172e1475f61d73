"""Windows with history (scheme B): what is cut, stored, packed, and that the model is conditioned on the past."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from history_windows import HISTORY, PAST, STEPS, configured
from ml_collections import ConfigDict
from random_batch import tiny_config
from synthetic import synthetic_episode
from tiny_model import random_params

from configs import ocbench_chunk
from wallwm_jax.console import UserError
from wallwm_jax.data.packing import CLEAN, DENOISE, batch_spec, draw_caption
from wallwm_jax.data.pipeline import make_loader
from wallwm_jax.events.actions import relative_actions
from wallwm_jax.events.windows import cut_windows
from wallwm_jax.training import objectives
from wallwm_jax.training.stages import get_stage


@pytest.fixture(scope="module")
def store(history_store):
    return history_store


@pytest.fixture(scope="module")
def batch(store):
    with make_loader(store, configured(store), start_step=0) as loader:
        return next(loader)


# What is cut


def test_a_window_holds_its_past_and_the_first_ones_hold_the_first_frame():
    episode = synthetic_episode(0, steps=80)
    windows = cut_windows(episode, ["history"], fixed_steps=STEPS, history=HISTORY)
    assert [window.start for window in windows] == [0, 24, 48, 72]
    first, second = windows[:2]
    assert first.frame_indices.tolist() == [0] * 9 + list(range(1, 13))
    assert second.frame_indices.tolist() == list(range(4, 25))  # the observation is frame 12
    assert (first.past_actions, second.past_actions) == (0, PAST)
    assert (first.num_latents, second.num_latents) == (2 + 1 + 3, 2 + 1 + 3)
    assert second.num_actions == PAST + STEPS
    assert second.latent_frame_indices.tolist() == [4, 8, 12, 16, 20, 24]
    assert second.keyframes.tolist() == [8, 11, 14, 17]
    assert windows[-1].num_latents == 2 + 1 + 1 and windows[-1].duration_s == pytest.approx(8 / episode.clock_hz)


@pytest.mark.parametrize("steps, history, most", [(100, 8, 64), (130, 0, 128), (8, 16, 0), (9, 1, 120)])
def test_a_window_that_the_video_cannot_hold_is_an_error(steps, history, most):
    with pytest.raises(UserError, match=f"history windows of {steps} steps after {history} latents .* up to {most}"):
        cut_windows(synthetic_episode(0), ["history"], fixed_steps=steps, history=history)


# What is stored


def test_actions_are_relative_to_the_observation_backward_and_forward(store):
    """Compared with the poses of the episode itself, past commands included."""
    windows = np.flatnonzero(store.index["kind"] == 2)
    records = [store.read(int(window)) for window in windows]
    assert {record.past_actions for record in records} == {0, PAST}
    record = next(record for record in records if record.start == STEPS)
    seed = store.episodes[record.episode_id]["seed"]
    episode = synthetic_episode(seed, steps=64 + 7 * seed)
    steps = slice(STEPS - PAST, STEPS - PAST + record.num_actions)
    expected, _ = relative_actions(episode.command_poses[steps], episode.command_grippers[steps], episode.poses[STEPS])
    np.testing.assert_allclose(record.actions, expected, atol=1e-6)
    assert record.history == HISTORY and len(record.frames[store.meta["views"][0]]) == 4 * HISTORY + 13
    observation = record.picture(store.meta["views"][0], int(record.keyframes[0]))
    event = store.read(int(np.flatnonzero(store.index["kind"] == 0)[0]))
    assert observation.shape == event.picture(store.meta["views"][0], 0).shape


def test_latents_are_one_pass_over_history_and_future(store):
    """The anchor's latent is the four frames that end at the observation, as in one encoding of the whole stretch."""
    record = store.read(int(np.flatnonzero((store.index["kind"] == 2) & (store.index["event_index"] == 1))[0]))
    view = store.meta["views"][0]
    video = record.video(view)
    whole = store.codec.normalized(store.stats.latent_mean, store.stats.latent_std).encode(video)
    assert len(whole) == record.num_latents == HISTORY + 1 + 3
    latents = np.empty_like(whole)
    store.read_latents(record, {view: latents})
    np.testing.assert_array_equal(latents, whole)
    np.testing.assert_array_equal(video[4 * HISTORY], record.picture(view, 4 * HISTORY))


# What is packed


def test_history_is_clean_at_negative_positions(batch):
    event = batch["latent_event"][0]
    for slot in range(1, event.max() + 1):
        position, role = batch["latent_pos"][0][event == slot], batch["latent_role"][0][event == slot]
        assert position.tolist() == list(range(-HISTORY, len(position) - HISTORY))
        np.testing.assert_array_equal(role, np.where(position > 0, DENOISE, CLEAN))
        action = batch["action_pos"][0][batch["action_event"][0] == slot]
        assert action[0] in (0, -PAST) and action[-1] < STEPS and (np.diff(action) == 1).all()
    present = batch["window_index"][0] >= 0
    assert (batch["window_number"][0][present] >= 1).all() and (batch["window_number"][0][~present] == 0).all()


def test_event_batches_have_no_window_number():
    config = tiny_config()
    assert "window_number" not in batch_spec(config, 1, num_views=2)


def test_a_chunk_may_be_told_the_event_that_goes_on_where_it_begins(store):
    """Half of the draws here; the level is the config's, and the rest is the instruction."""
    config = configured(store)
    with config.unlocked():
        config.data.levels = ConfigDict({"subtask": 1.0})
        config.data.update(caption_drop=0.0, caption_drop_long=0.0, paraphrase_prob=0.0, duration_clause_prob=0.0)
        config.data.chunk_event_prob = 0.5
    window = int(np.flatnonzero((store.index["kind"] == 2) & (store.index["event_index"] == 1))[0])
    record, rng = store.read(window), np.random.default_rng(0)
    drawn = [draw_caption(store, record, config.data, rng) for _ in range(400)]
    spans = store.episodes[record.episode_id]["spans"]["subtask"]
    event = next(span["caption"] for span in spans if span["start"] <= STEPS < span["end"])
    assert {caption.text for caption in drawn} == {event, store.caption(record.caption_id)}
    assert sum(caption.text == event for caption in drawn) / 400 == pytest.approx(0.5, abs=0.08)
    assert store.event_at(record.episode_id, "subtask", 10_000) is None


def test_a_model_of_chunks_from_scratch_sees_as_many_tokens_as_the_adapted_one():
    event, adapted, scratch = (ocbench_chunk.get_config(part) for part in ("event", "adapt", "scratch"))
    seen = [33.3 * event.train.steps, *(36 * config.train.steps for config in (adapted, scratch))]
    assert sum(seen[:2]) == pytest.approx(seen[2], rel=1e-3)
    for config in (adapted, scratch):
        assert (config.data.rows, config.data.latents_per_row) == (event.data.rows, 36)
    assert (adapted.train.stage, scratch.train.stage) == ("chunk", "joint")
    assert adapted.optim.lr < scratch.optim.lr and adapted.model == scratch.model == event.model
    with pytest.raises(UserError, match="the part is event, adapt or scratch"):
        ocbench_chunk.get_config("more")


# What is learned


@pytest.mark.extended
def test_the_loss_counts_the_future_and_depends_on_the_past(store, batch):
    config = configured(store)
    params = random_params(config.model)
    arrays = {name: jnp.asarray(value) for name, value in batch.items() if name in batch_spec(config, 1)}

    def losses(arrays):
        weight = jnp.ones(config.model.latent_channels)
        return objectives.compute_loss(params, {}, config, get_stage("joint"), arrays, jax.random.key(0), weight)[1]

    losses = jax.jit(losses)
    plain = losses(arrays)
    assert np.isfinite(plain["loss"])
    past_latent = (arrays["latent_pos"] < 0)[:, None, :, None, None, None]
    past_action = (arrays["action_pos"] < 0)[..., None]
    for name, is_past in (("latents", past_latent), ("actions", past_action)):
        other = losses({**arrays, name: jnp.where(is_past, arrays[name] + 1.0, arrays[name])})
        assert abs(other["loss_action"] - plain["loss_action"]) > 1e-5, name
