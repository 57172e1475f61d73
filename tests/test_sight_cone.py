"""Sight cones against sampled ones, against projection with a real distortion model, and their place in the tower."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_batch import random_batch, tiny_config
from tiny_model import random_params

from wallwm_jax.console import UserError
from wallwm_jax.data.event_store import open_store
from wallwm_jax.evaluation import sight_cones
from wallwm_jax.models import world_action_model as wam
from wallwm_jax.models.sight_cone import cones, sight_mask
from wallwm_jax.models.view_attention import ViewAttention

NEAR, FAR = 0.1, 3.0


def looking_at(eye, target, roll=0.0):
    """World-from-camera `[3, 4]`, OpenCV axes."""
    forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
    right = np.cross(forward, [np.sin(roll), 0.0, np.cos(roll)])
    right /= np.linalg.norm(right)
    return np.column_stack([right, np.cross(forward, right), forward, eye])


def geometry_of(pose, focal=0.9, distortion=(0.0,) * 5):
    return np.concatenate([[focal, focal, 0.5, 0.5], distortion, np.ravel(pose)]).astype(np.float32)


def camera_pair(rng):
    eyes = rng.uniform(-1, 1, (2, 3)) * [1.0, 1.0, 0.3] + [0, 0, 0.8]
    return np.stack([geometry_of(looking_at(eye, rng.uniform(-0.3, 0.3, 3), rng.uniform(-1, 1))) for eye in eyes])


def sampled_mask(geometry, rows, columns, samples=4000, seed=0):
    """Whether random points of one cone lie in the other, either way round, `[P, P]`."""
    rng = np.random.default_rng(seed)
    apex, axis, slope = (np.asarray(part) for part in cones(jnp.asarray(geometry), rows, columns)[:3])
    seen = np.zeros((rows * columns,) * 2, bool)
    for first, second in ((0, 1), (1, 0)):
        for i in range(rows * columns):
            across = np.linalg.svd(axis[first, i][None])[2][1:]
            t, turn = rng.uniform(NEAR, FAR, samples), rng.uniform(0, 2 * np.pi, samples)
            radius = slope[first, i] * t * np.sqrt(rng.uniform(0, 1, samples))
            points = apex[first] + t[:, None] * axis[first, i]
            points += radius[:, None] * (np.cos(turn)[:, None] * across[0] + np.sin(turn)[:, None] * across[1])
            from_other = points - apex[second]
            depth = from_other @ axis[second].T
            distance = np.linalg.norm(from_other[:, None] - depth[..., None] * axis[second], axis=-1)
            inside = ((depth > NEAR) & (depth < FAR) & (distance <= depth * slope[second])).any(0)
            if first == 0:
                seen[i] |= inside
            else:
                seen[:, i] |= inside
    return seen


def test_the_closed_form_agrees_with_sampled_cones():
    """What is sampled in both cones is open; what is open is seldom out of reach of the samples."""
    rng, found, opened, both = np.random.default_rng(3), 0, 0, 0
    for _ in range(12):
        geometry = camera_pair(rng)
        ours = np.asarray(sight_mask(jnp.asarray(geometry), 4, 4, near=NEAR, far=FAR))[:16, 16:]
        theirs = sampled_mask(geometry, 4, 4)
        found, opened, both = found + theirs.sum(), opened + ours.sum(), both + (ours & theirs).sum()
    print(f"recall {both / found:.4f} precision {both / opened:.4f} open {opened / (12 * 256):.3f}")
    assert 0.1 < opened / (12 * 256) < 0.8
    assert both / found > 0.99
    assert both / opened > 0.9


def test_a_point_seen_by_two_cameras_lies_in_patches_that_are_open_to_each_other():
    """Projected with OpenCV, wide angle distortion included; the cameras differ from frame to frame."""
    rng = np.random.default_rng(5)
    distortion = np.array([-0.2, 0.05, 0.002, -0.001, 0.0])
    checked = 0
    for _ in range(40):
        geometry = camera_pair(rng)
        geometry[:, 4:9] = distortion
        mask = np.asarray(sight_mask(jnp.asarray(geometry), 6, 6, near=NEAR, far=FAR))
        for point in rng.uniform(-0.4, 0.4, (20, 3)):
            patches = []
            for view in geometry:
                pose = view[9:].reshape(3, 4)
                inside = (point - pose[:, 3]) @ pose[:, :3]
                if not NEAR < inside[2] < FAR:
                    break
                matrix = np.array([[view[0], 0, view[2]], [0, view[1], view[3]], [0, 0, 1]], np.float64)
                pixel = cv2.projectPoints(inside[None], np.zeros(3), np.zeros(3), matrix, distortion)[0].ravel()
                if not (0 <= pixel[0] < 1 and 0 <= pixel[1] < 1):
                    break
                patches.append(int(pixel[1] * 6) * 6 + int(pixel[0] * 6))
            if len(patches) == 2:
                checked += 1
                assert mask[patches[0], 36 + patches[1]] and mask[36 + patches[1], patches[0]]
    assert checked > 100


@pytest.mark.parametrize("unknown", [0, 1])
def test_a_view_is_open_to_itself_and_without_calibration_to_all(unknown):
    geometry = np.stack([*camera_pair(np.random.default_rng(1)), camera_pair(np.random.default_rng(2))[0]])
    full = np.asarray(sight_mask(jnp.asarray(geometry), 3, 2, near=NEAR, far=FAR))
    assert full.shape == (18, 18) and (full == full.T).all() and not full.all()
    for view in range(3):
        assert full[view * 6 : view * 6 + 6, view * 6 : view * 6 + 6].all()
    geometry[unknown] = 0.0
    partly = np.asarray(sight_mask(jnp.asarray(geometry), 3, 2, near=NEAR, far=FAR))
    assert partly[unknown * 6 : unknown * 6 + 6].all() and partly[:, unknown * 6 : unknown * 6 + 6].all()
    rest = np.arange(18) // 6 != unknown
    np.testing.assert_array_equal(partly[np.ix_(rest, rest)], full[np.ix_(rest, rest)])


def test_parallel_axes_meet_where_the_radii_reach():
    """Two cameras side by side, looking the same way: the baseline over the radii decides."""
    poses = [looking_at([x, 0, 0], [x, 1, 0]) for x in (0.0, 0.4)]
    geometry = jnp.asarray(np.stack([geometry_of(pose, focal=2.0) for pose in poses]))
    slope = float(cones(geometry, 1, 1).slope[0, 0])
    reach = 0.4 / (2 * slope)  # distance at which the two radii add up to the baseline
    for far, meets in ((reach * 1.5, True), (reach * 0.9, False)):
        assert bool(sight_mask(geometry, 1, 1, near=NEAR, far=far)[0, 1]) == meets


def test_closed_pairs_of_cells_do_not_reach_each_other():
    geometry = camera_pair(np.random.default_rng(4))
    mask = sight_mask(jnp.asarray(geometry), 2, 2, near=NEAR, far=FAR)
    branch = ViewAttention(8, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    branch.attention.output.kernel[...] = jnp.eye(8)
    x = jax.random.normal(jax.random.key(0), (1, 1, 8, 8))
    time, angles, bias = jnp.ones((1, 1, 3, 8)), jnp.zeros((1, 1, 8, 2)), jnp.zeros((1, 1, 8))
    reach = jax.jacobian(lambda x: branch(x, time, angles, bias, mask[None, None]))(x)
    reached = np.abs(np.asarray(reach)).max((0, 1, 3, 4, 5, 7)) > 0
    np.testing.assert_array_equal(reached, np.asarray(mask))
    assert not np.asarray(mask).all()


@pytest.mark.extended
def test_the_tower_masks_with_calibration_and_is_open_without():
    """At inference a batch has no calibration: the mask is dropped."""
    config = tiny_config()
    model = config.model.copy_and_resolve_references()
    batch = {name: jnp.asarray(value) for name, value in random_batch(config, seed=3).items()}
    frames = batch["view_geometry"].shape[2]
    apart = [looking_at([0, -1, 0.5], [0, -3, 0.5]), looking_at([0, 1, 0.5], [0, 3, 0.5])]
    cameras = jnp.asarray(np.stack([geometry_of(pose) for pose in apart]))
    calibrated = jnp.broadcast_to(cameras[None, :, None], (*batch["view_geometry"].shape[:2], frames, 21))
    params = random_params(model)

    def velocity(on, geometry):
        model.sight_cone.on = on
        frozen, inputs = model.copy_and_resolve_references().lock(), {**batch, "view_geometry": geometry}
        sigma = jnp.full(batch["text_length"].shape, 0.5)
        text = wam.encode_text(params, frozen, inputs)
        run = jax.jit(lambda params: wam.video_context(params, frozen, inputs, batch["latents"], sigma, text)[0])
        return np.asarray(run(params))

    without = velocity(False, calibrated)
    np.testing.assert_array_equal(without, velocity(True, jnp.zeros_like(calibrated)))
    assert np.abs(without - velocity(True, calibrated)).max() > 1e-3


def test_the_picture_has_a_row_per_latent_and_names_a_view_that_is_not_there(small_store):
    store = open_store(small_store)
    index = int(np.flatnonzero(store.index["length"] == 3)[0])
    picture = sight_cones.draw(store, index, ("ur5e/wrist", "front_pixels"), 4, NEAR, FAR)
    assert picture.size == (5 * 224, 3 * 224)
    with pytest.raises(UserError, match="no calibrated view 'side'"):
        sight_cones.draw(store, index, ("side", "front_pixels"), 4, NEAR, FAR)
