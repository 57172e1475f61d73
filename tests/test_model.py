"""The world action model: what reaches what, one-way coupling, reuse of the video forward, gradients, learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict
from random_batch import random_batch, tiny_config

from wallwm_jax.console import UserError
from wallwm_jax.models import flow_matching as fm
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.action_tower import is_given, token_order

CONFIG = tiny_config()
MODEL = CONFIG.model
DRAWS = 3


def with_model(**changes):
    config = MODEL.copy_and_resolve_references()
    with config.unlocked():
        config.update(changes)
    return config.lock()


def quick_jit(function, **options):
    """Compiles fast rather than well: these models are tiny."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


@quick_jit
def init(key):
    return wam.init(MODEL, key)


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(jnp.asarray, random_batch(CONFIG, seed=1))


@pytest.fixture(scope="module")
def params():
    """Parameters with every zero-initialised branch opened, so that each path carries signal."""
    params = init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


def draw_noise(batch, seed=2, draws=DRAWS):
    keys = jax.random.split(jax.random.key(seed), 4)
    sigma = batch["text_length"].shape
    return dict(
        noisy_latents=jax.random.normal(keys[0], batch["latents"].shape),
        video_sigma=jax.random.uniform(keys[1], sigma),
        noisy_actions=jax.random.normal(keys[2], (draws, *batch["actions"].shape)),
        action_sigma=jax.random.uniform(keys[3], (draws, *sigma)),
    )


@functools.partial(quick_jit, static_argnames=("run_actions", "train_video"))
def run(params, batch, noise, run_actions=True, train_video=True):
    text = wam.encode_text(params, MODEL, batch)
    outputs = wam.forward(params, MODEL, batch, text=text, run_actions=run_actions, train_video=train_video, **noise)
    return outputs, wam.predict_duration(params, MODEL, batch, text)


def losses(params, batch, noise, targets, model=MODEL, **options):
    """(sum, (video, action)) of the mean squared velocity errors over what is to be denoised."""
    text = wam.encode_text(params, model, batch)
    outputs = wam.forward(params, model, batch, text=text, **options, **noise)
    denoised = jnp.broadcast_to((batch["latent_role"] == 2)[:, None, :, None, None, None], targets[0].shape)
    video = jnp.sum(jnp.where(denoised, (outputs.video_velocity - targets[0]) ** 2, 0.0)) / denoised.sum()
    if outputs.action_velocity is None:
        return video, (video, video)
    valid = jnp.broadcast_to(batch["action_valid"], targets[1].shape)
    action = jnp.sum(jnp.where(valid, (outputs.action_velocity - targets[1]) ** 2, 0.0)) / valid.sum()
    return video + action, (video, action)


loss_and_gradient = quick_jit(jax.value_and_grad(losses, has_aux=True))


def as_training_example(batch, noise):
    """(noisy inputs, velocity targets) of the batch's own latents and actions."""

    def per_position(sigma, event):
        return jnp.take_along_axis(sigma, jnp.maximum(event - 1, 0), 1)

    frames = per_position(noise["video_sigma"], batch["latent_event"])[:, None, :, None, None, None]
    tokens = jax.vmap(lambda sigma: per_position(sigma, batch["action_event"]))(noise["action_sigma"])[..., None]
    noisy = dict(
        noise,
        noisy_latents=fm.add_noise(batch["latents"], noise["noisy_latents"], frames),
        noisy_actions=fm.add_noise(batch["actions"], noise["noisy_actions"], tokens),
    )
    targets = (
        fm.velocity_target(batch["latents"], noise["noisy_latents"]),
        fm.velocity_target(batch["actions"], noise["noisy_actions"]),
    )
    return noisy, targets


# --- what reaches what ---------------------------------------------------------------------------------------------


def poison(batch, noise, event):
    """Other finite values in everything that belongs to one event of every row."""
    rng = np.random.default_rng(5)
    batch, noise = ({k: np.array(v) for k, v in part.items()} for part in (batch, noise))
    frames, tokens, slot = batch["latent_event"] == event, batch["action_event"] == event, event - 1
    for latents in (batch["latents"], noise["noisy_latents"]):
        moved = np.moveaxis(latents, 1, 2)
        moved[frames] = 100 * rng.normal(size=moved[frames].shape)
    batch["actions"][tokens] = 100 * rng.normal(size=batch["actions"][tokens].shape)
    noise["noisy_actions"][:, tokens] = 100 * rng.normal(size=noise["noisy_actions"][:, tokens].shape)
    batch["state"][:, slot] = 100 * rng.normal(size=batch["state"][:, slot].shape)
    batch["action_valid"][tokens] = ~batch["action_valid"][tokens]
    batch["state_valid"][:, slot] = ~batch["state_valid"][:, slot]
    batch["text_ids"][:, slot] = rng.integers(3, 200, batch["text_ids"][:, slot].shape)
    batch["text_length"][:, slot] = batch["text_ids"].shape[-1]
    batch["view_id"][:, slot] = [[0, 3], [1, 0]]
    batch["valid_rect"][:, slot] = 0.25
    batch["duration_s"][:, slot] = 77
    batch["window_index"][:, slot] = 12345
    noise["video_sigma"][:, slot] = 0.99
    noise["action_sigma"][:, :, slot] = 0.01
    return batch, noise


def test_poisoning_one_event_leaves_all_others_bit_unchanged(params, batch):
    noise = draw_noise(batch)
    clean, clean_duration = run(params, batch, noise)
    assert int(batch["latent_event"].max()) >= 3
    for event in (1, 2):
        outputs, duration = run(params, *poison(batch, noise, event))
        others = np.asarray(batch["latent_event"] != event)
        assert all(np.isfinite(np.asarray(velocity)).all() for velocity in outputs)
        ours, theirs = (np.moveaxis(np.asarray(o.video_velocity), 1, 2) for o in (clean, outputs))
        np.testing.assert_array_equal(ours[others], theirs[others])
        assert np.abs(ours[~others] - theirs[~others]).max() > 0.1
        others = np.asarray(batch["action_event"] != event)
        ours, theirs = (np.asarray(o.action_velocity) for o in (clean, outputs))
        np.testing.assert_array_equal(ours[:, others], theirs[:, others])
        assert np.abs(ours[:, ~others] - theirs[:, ~others]).max() > 0.1
        kept = np.arange(duration.shape[1]) != event - 1
        np.testing.assert_array_equal(clean_duration[:, kept], duration[:, kept])
        assert np.abs(clean_duration[:, ~kept] - duration[:, ~kept]).max() > 1e-3


def test_an_absent_view_reaches_nothing(params, batch):
    noise = draw_noise(batch)
    absent = np.array(batch["view_id"])
    absent[:, :, 1] = 0
    closed = {**batch, "view_id": jnp.asarray(absent)}
    other = {**closed, "latents": closed["latents"].at[:, 1].add(3.0)}
    moved = {**noise, "noisy_latents": noise["noisy_latents"].at[:, 1].add(3.0)}
    (ours, duration), (theirs, other_duration) = run(params, closed, noise), run(params, other, moved)
    np.testing.assert_array_equal(ours.video_velocity[:, 0], theirs.video_velocity[:, 0])
    np.testing.assert_array_equal(ours.action_velocity, theirs.action_velocity)
    np.testing.assert_array_equal(duration, other_duration)
    assert np.isfinite(np.asarray(theirs.video_velocity)).all()


def test_clean_latents_come_from_the_batch(params, batch):
    noise = draw_noise(batch)
    clean = np.asarray(batch["latent_role"] == 1)[:, None, :, None, None, None]
    other = {**noise, "noisy_latents": jnp.where(clean, 9.0, noise["noisy_latents"])}
    for ours, theirs in zip(run(params, batch, noise)[0], run(params, batch, other)[0]):
        np.testing.assert_array_equal(ours, theirs)


def test_actions_may_lie_in_any_order(params, batch):
    noise = draw_noise(batch)
    order = np.random.default_rng(0).permutation(batch["actions"].shape[1])
    names = ("actions", "action_event", "action_pos", "action_valid")
    shuffled = {**batch, **{name: batch[name][:, order] for name in names}}
    ours = run(params, batch, noise)[0].action_velocity[:, :, order]
    theirs = run(params, shuffled, {**noise, "noisy_actions": noise["noisy_actions"][:, :, order]})[0].action_velocity
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_an_action_shares_its_latents_place_in_time(batch):
    """E_tau rows: state and clean latent 0, action k of an event floor(k / 8) + 1 (WALL-WM section 2.6)."""
    tower = wam.WorldActionModel(FrozenConfigDict(MODEL), rngs=nnx.Rngs(0)).action
    sigma = jnp.zeros((1, *batch["text_length"].shape))
    condition = tower.condition(batch, sigma, sigma[0], jnp.zeros((*batch["latent_event"].shape, 2), int))
    order = np.argsort(np.asarray(token_order(batch)), axis=1)
    rows = np.take_along_axis(np.asarray(condition.frame[0].argmax(-1)), order, 1) - MODEL.max_latents
    events = batch["text_length"].shape[1]
    assert (rows[:, :events] == 0).all()
    real = np.asarray(batch["action_event"]) > 0
    np.testing.assert_array_equal(rows[:, events:][real], np.asarray(batch["action_pos"])[real] // 8 + 1)
    latest = int(rows[0, events:][np.asarray(batch["action_event"])[0] == 1].max())
    assert latest == int(np.asarray(batch["latent_pos"])[0][np.asarray(batch["latent_event"])[0] == 1].max())


# --- windows with history (scheme B) --------------------------------------------------------------------------------


def with_history(batch, latents=1):
    """The batch as windows observed `latents` later: what lies before is given, numbers of the windows vary."""
    shifted = {**batch, "latent_pos": batch["latent_pos"] - latents * (batch["latent_event"] > 0)}
    shifted["latent_role"] = jnp.where(
        (shifted["latent_pos"] <= 0) & (batch["latent_event"] > 0), 1, batch["latent_role"]
    )
    shifted["action_pos"] = batch["action_pos"] - 8 * latents * (batch["action_event"] > 0)
    shifted["window_number"] = 1 + jnp.arange(batch["text_length"].size).reshape(batch["text_length"].shape)
    return shifted


def test_history_and_anchor_stand_before_the_future(batch):
    """tau of M = 2: history -1 (its latent -2 has no actions here), anchor 0, future 1, 2, ...; eight actions each."""
    batch = with_history(batch, 2)
    tower = wam.WorldActionModel(FrozenConfigDict(MODEL), rngs=nnx.Rngs(0)).action
    sigma = jnp.zeros((1, *batch["text_length"].shape))
    condition = tower.condition(batch, sigma, sigma[0], jnp.zeros((*batch["latent_event"].shape, 2), int))
    order = np.argsort(np.asarray(token_order(batch)), axis=1)
    events = batch["text_length"].shape[1]
    rows = np.take_along_axis(np.asarray(condition.frame[0].argmax(-1)), order, 1)[:, events:] - MODEL.max_latents
    position = np.asarray(batch["action_pos"])
    real, seen = np.asarray(batch["action_event"]) > 0, set()
    for low, tau in ((-16, -1), (-8, 0), (0, 1), (8, 2)):
        there = real & (position >= low) & (position < low + 8)
        assert (rows[there] == tau).all()
        seen |= {tau} if there.any() else set()
    assert seen >= {-1, 0, 1}


def test_what_is_given_conditions_and_is_not_denoised(params, batch):
    batch, noise = with_history(batch), draw_noise(batch)
    base = run(params, batch, noise)[0]
    given = np.asarray(is_given(batch))
    assert given.any()
    other = {**noise, "noisy_actions": jnp.where(given[..., None], 9.0, noise["noisy_actions"])}
    np.testing.assert_array_equal(run(params, batch, other)[0].action_velocity, base.action_velocity)
    changed = {**batch, "actions": jnp.where(given[..., None], 0.5 + batch["actions"], batch["actions"])}
    moved = np.abs(run(params, changed, noise)[0].action_velocity - base.action_velocity).max((0, 3))
    future = (np.asarray(batch["action_event"]) > 0) & ~given
    assert moved[future].max() > 1e-3
    np.testing.assert_array_equal(run(params, changed, noise)[0].video_velocity, base.video_velocity)


def test_the_window_number_adds_its_embedding_to_its_event_alone(params, batch):
    batch, noise = with_history(batch), draw_noise(batch)
    numbers = batch.pop("window_number")
    absent = run(params, batch, noise)[0].action_velocity
    off = run(params, {**batch, "window_number": 0 * numbers}, noise)[0].action_velocity
    np.testing.assert_array_equal(off, absent)
    one = run(params, {**batch, "window_number": (0 * numbers).at[0, 0].set(3)}, noise)[0].action_velocity
    event = np.asarray(batch["action_event"])
    moved = np.abs(one - absent).max((0, 3))
    assert moved[0][event[0] == 1].max() > 1e-3
    assert moved[0][event[0] != 1].max() == moved[1:].max() == 0


# --- one-way coupling ----------------------------------------------------------------------------------------------


def test_the_video_is_bit_equal_with_and_without_the_action_tower(params, batch):
    noise = draw_noise(batch)
    attached, _ = run(params, batch, noise)
    alone, _ = run(params, batch, noise, run_actions=False)
    assert alone.action_velocity is None
    np.testing.assert_array_equal(attached.video_velocity, alone.video_velocity)


def test_a_place_embedding_starts_as_nothing_and_tells_patches_and_cameras_apart(params, batch):
    """Zero, it is the tower without it; one camera's row moves what that camera's events predict, and no others."""
    model = with_model(place_embedding=True)
    patches = MODEL.latent_shape[0] * MODEL.latent_shape[1] // (MODEL.patch[0] * MODEL.patch[1])
    table = jnp.zeros((MODEL.max_views, patches, MODEL.width))
    noise = draw_noise(batch)

    @quick_jit
    def velocity(table):
        placed = {**params, "video": {**params["video"], "place_embedding": table}}
        text = wam.encode_text(placed, model, batch)
        return wam.forward(placed, model, batch, text=text, run_actions=False, **noise).video_velocity

    plain = run(params, batch, noise, run_actions=False)[0].video_velocity
    start = velocity(table)
    np.testing.assert_allclose(start, plain, atol=1e-5)
    camera = int(batch["view_id"].max())
    moved = velocity(table.at[camera, 0].set(1.0)) != start
    seen = (batch["view_id"] == camera).any(-1)
    others = ~jnp.take_along_axis(seen, jnp.maximum(batch["latent_event"] - 1, 0), 1) & (batch["latent_event"] > 0)
    assert moved.any()
    assert not (moved & others[:, None, :, None, None, None]).any()


def test_context_and_action_velocity_equal_the_joint_forward(params, batch):
    noise = draw_noise(batch)
    joint, _ = run(params, batch, noise)

    @quick_jit
    def in_two_steps(params, batch, noise):
        text = wam.encode_text(params, MODEL, batch)
        video = (noise["noisy_latents"], noise["video_sigma"])
        velocity, context = wam.video_context(params, MODEL, batch, *video, text)
        actions = (noise["noisy_actions"], noise["action_sigma"])
        return velocity, wam.action_velocity(params, MODEL, batch, context, *actions)

    for ours, theirs in zip(in_two_steps(params, batch, noise), joint):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_prediction_of_clean_data_becomes_the_velocity_it_implies(params, batch):
    noise = draw_noise(batch)
    head = run(params, batch, noise)[0]
    model = with_model(action_prediction="clean", video_prediction="clean")
    text = wam.encode_text(params, model, batch)
    forward = quick_jit(lambda *inputs: wam.forward(inputs[0], model, inputs[1], text=text, **inputs[2]))
    clean = forward(params, batch, noise)

    def of_token(sigma, event):
        slot = np.broadcast_to(np.maximum(np.asarray(event) - 1, 0), (*sigma.shape[:-1], event.shape[-1]))
        return np.take_along_axis(np.asarray(sigma), slot, -1)

    sigma = of_token(noise["action_sigma"], batch["action_event"])[..., None]
    expected = (noise["noisy_actions"] - head.action_velocity) / np.maximum(sigma, 0.05)
    np.testing.assert_allclose(clean.action_velocity, expected, rtol=1e-5, atol=1e-5)
    sigma = of_token(noise["video_sigma"], batch["latent_event"])[:, None, :, None, None, None]
    expected = np.asarray((noise["noisy_latents"] - head.video_velocity) / np.maximum(sigma, 0.05))
    denoise = np.asarray(batch["latent_role"] == 2)[:, None, :, None, None, None]
    np.testing.assert_allclose(
        np.where(denoise, clean.video_velocity, 0), np.where(denoise, expected, 0), rtol=1e-4, atol=1e-4
    )


def test_draws_share_the_video_and_nothing_else(params, batch):
    noise = draw_noise(batch)
    together = run(params, batch, noise)[0].action_velocity
    actions, sigma = noise["noisy_actions"], noise["action_sigma"]
    same = dict(noise, noisy_actions=actions.at[:].set(actions[0]), action_sigma=sigma.at[:].set(sigma[0]))
    alone = run(params, batch, same)[0].action_velocity
    for draw in range(DRAWS):
        np.testing.assert_allclose(alone[draw], together[0], atol=1e-6)
    assert float(jnp.abs(together[1] - together[0]).max()) > 0.1


def test_the_actions_see_the_video_and_its_noise_level(params, batch):
    noise = draw_noise(batch)
    base = np.asarray(run(params, batch, noise)[0].action_velocity)
    for name in ("noisy_latents", "video_sigma"):
        changed = run(params, batch, {**noise, name: noise[name] * 0.5})[0].action_velocity
        assert np.abs(base - changed)[:, np.asarray(batch["action_event"]) > 0].max() > 1e-3, name


@pytest.mark.extended
def test_stage_action_has_the_action_gradient_only_and_remat_keeps_it(params, batch):
    example = as_training_example(batch, draw_noise(batch))
    stage = functools.partial(losses, model=with_model(remat="full"), train_video=False)
    gradient = quick_jit(jax.grad(lambda *inputs: stage(*inputs)[0]))(params, batch, *example)
    _, reference = loss_and_gradient(params, batch, *example)
    for path, ours in jax.tree_util.tree_leaves_with_path(gradient["action"]):
        theirs = functools.reduce(lambda tree, key: tree[key.key], path, reference["action"])
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1.0, float(jnp.abs(theirs).max())))
    del gradient["action"], gradient["video"]["head"], gradient["video"]["head_modulation"]
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) == 0


def test_stage_action_builds_no_video_backward():
    """FLOPs of loss and gradient, where the video's width dwarfs the actions'."""
    config = tiny_config(rows=1)
    with config.unlocked():
        config.model.update(width=192, ffn=768, depth=1)
    model = config.model
    batch, params = random_batch(config), wam.abstract_params(model)
    noisy, targets = jax.eval_shape(lambda b: as_training_example(b, draw_noise(b, draws=1)), batch)

    def flops(function):
        return jax.jit(function).lower(params, batch, noisy, targets).cost_analysis()["flops"]

    def action_loss(*inputs, **options):
        return losses(*inputs, model=model, **options)[1][1]

    forward = flops(action_loss)
    frozen = flops(jax.value_and_grad(functools.partial(action_loss, train_video=False)))
    full = flops(jax.value_and_grad(lambda *inputs: losses(*inputs, model=model)[0]))
    assert frozen < 1.5 * forward
    assert frozen < 0.6 * full


# --- structure -----------------------------------------------------------------------------------------------------


def test_at_init_several_views_equal_each_view_alone_bit_for_bit(batch):
    """Cross-view attention starts closed, its gradient does not."""
    params = init(jax.random.key(3))
    params["video"]["head"]["kernel"] = jax.random.normal(jax.random.key(4), params["video"]["head"]["kernel"].shape)
    noise = draw_noise(batch)
    both, _ = run(params, batch, noise, run_actions=False)
    single = with_model(view_attention=False)
    alone = dict(params, video=dict(params["video"]))
    del alone["video"]["cameras"]
    alone["video"]["blocks"] = {k: v for k, v in params["video"]["blocks"].items() if k != "view_attention"}

    @quick_jit
    def one_view_tower(params):
        text = wam.encode_text(params, single, batch)
        return wam.forward(params, single, batch, text=text, run_actions=False, **noise)

    without = one_view_tower(alone)
    np.testing.assert_array_equal(both.video_velocity, without.video_velocity)
    branch = params["video"]["blocks"]["view_attention"]
    own = params["video"]["blocks"]
    np.testing.assert_array_equal(branch["attention"]["key"]["kernel"], own["self_attention"]["key"]["kernel"])
    np.testing.assert_array_equal(branch["modulation"], own["modulation"][:, :3])
    (_, _), gradient = loss_and_gradient(params, batch, *as_training_example(batch, noise))
    output = gradient["video"]["blocks"]["view_attention"]["attention"]["output"]["kernel"]
    assert float(jnp.abs(output).max()) > 0


@pytest.mark.parametrize("pad_to", [0, 40])
def test_caption_padding_equals_the_padded_twin(pad_to):
    """`pad_to` = P attends to P tokens of which those beyond the caption are zero; 0 attends to the caption."""
    tokens = 40
    text_config = MODEL.text.copy_and_resolve_references()
    with text_config.unlocked():
        text_config.update(kind="features", pad_to=pad_to)
    model = with_model(text=text_config)
    batch = jax.tree.map(jnp.asarray, random_batch(CONFIG, seed=1))
    assert "text" not in wam.abstract_params(model)
    params = {name: part for name, part in init(jax.random.key(0)).items() if name != "text"}
    params["video"]["head"]["kernel"] += jax.random.normal(jax.random.key(4), params["video"]["head"]["kernel"].shape)
    noise = draw_noise(batch)
    features = jax.random.normal(jax.random.key(6), (*batch["text_ids"].shape, MODEL.text.width))
    length = batch["text_length"][..., None, None]
    features = jnp.where(jnp.arange(features.shape[2])[:, None] < length, features, 0)
    ours = {**batch, "text_features": features}
    twin_features = jnp.pad(features, ((0, 0), (0, 0), (0, tokens - features.shape[2]), (0, 0)))
    twin_length = jnp.full_like(batch["text_length"], tokens) if pad_to else batch["text_length"]
    twin = {**batch, "text_features": twin_features, "text_length": twin_length}

    @quick_jit
    def video(batch):
        text = wam.encode_text(params, model, batch)
        return wam.forward(params, model, batch, text=text, run_actions=False, **noise).video_velocity

    np.testing.assert_allclose(video(ours), video(twin), atol=1e-5)


def test_half_precision_stays_close_to_float32(params, batch):
    noise = draw_noise(batch)
    expected, _ = run(params, batch, noise)
    model = with_model(compute_dtype="bfloat16")
    text = wam.encode_text(params, model, batch)
    outputs = quick_jit(lambda p: wam.forward(p, model, batch, text=text, **noise))(params)
    assert text.features.dtype == jnp.bfloat16
    for ours, theirs in zip(outputs, expected):
        assert ours.dtype == jnp.float32
        assert float(jnp.std(ours - theirs)) < 0.03 * float(jnp.std(theirs))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(width=33), "model.width = 33 over 2 heads"),
        (dict(patch=(3, 3)), "not a multiple of model.patch"),
        (dict(remat="some"), "model.remat = 'some'"),
        (dict(compute_dtype="float16"), "model.compute_dtype = 'float16'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(change, message):
    with pytest.raises(UserError, match=message):
        wam.abstract_params(with_model(**change))


# --- duration ------------------------------------------------------------------------------------------------------


def test_duration_ignores_the_length_and_the_future_of_the_event(params, batch):
    duration = functools.partial(wam.predict_duration, params, MODEL)
    text = wam.encode_text(params, MODEL, batch)
    expected = duration(batch, text)
    last = int(batch["latent_event"].max(initial=0, axis=1)[0])
    frames = np.asarray(batch["latent_event"])[0] == last
    end = int(np.flatnonzero(frames)[-1])
    shorter = {k: np.array(v) for k, v in batch.items()}
    for name in ("latent_event", "latent_role", "latent_pos"):
        shorter[name][0, end] = 0
    future = np.asarray(batch["latent_role"]) == 2
    np.moveaxis(shorter["latents"], 1, 2)[future] = 5.0
    shorter["action_event"][0, -8:] = 0
    shorter["actions"] += 1
    shorter["duration_s"] *= 2
    np.testing.assert_array_equal(duration(shorter, text), expected)
    first = {**batch, "latents": batch["latents"] * 2 + 1}
    assert float(jnp.abs(duration(first, text) - expected).max()) > 1e-3


def test_duration_quantiles_rise(params, batch):
    quantiles = wam.predict_duration(params, MODEL, batch, wam.encode_text(params, MODEL, batch))
    assert quantiles.shape == (2, 5, 3)
    assert float(jnp.diff(quantiles, axis=-1).min()) > 0


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.extended
def test_a_tiny_model_memorises_one_batch(batch):
    example = as_training_example(batch, draw_noise(batch))
    optimizer = optax.adam(5e-3)

    @quick_jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    params = init(jax.random.key(0))
    state, history = optimizer.init(params), []
    for _ in range(80):
        (_, values), gradient = loss_and_gradient(params, batch, *example)
        params, state = update(params, state, gradient)
        history.append(values)
    for stream, first, last in zip(("video", "action"), history[0], history[-1]):
        assert float(first) > 1.0, stream
        assert float(last) < float(first) / 5, stream
