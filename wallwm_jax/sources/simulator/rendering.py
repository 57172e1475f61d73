"""Fast MuJoCo pictures without a display: chooses the GL backend, thins out visual meshes, renders, calibrates cameras.

`check_rendering()` must run before anything imports `mujoco`, which reads `MUJOCO_GL` once, at import. Run as
`python -m wallwm_jax.sources.simulator.rendering` it prints the backend, or the command that installs what is missing.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import weakref
from typing import Any

import numpy as np

from wallwm_jax.console import UserError

BACKENDS = ("egl", "osmesa")  # in order of preference
CELL = 0.01  # metres: visual mesh vertices closer than this are merged
MIN_FACES = 300  # smaller meshes are cheap and keep their shape

_CHOSEN = "WALLWM_MUJOCO_GL"  # set for child processes, which then need not probe again
_PROBE = (
    'import mujoco; m = mujoco.MjModel.from_xml_string(\'<mujoco><worldbody><light pos="0 0 2"/>'
    '<geom size=".1" rgba="1 0 0 1"/></worldbody></mujoco>\'); d = mujoco.MjData(m); mujoco.mj_forward(m, d);'
    "r = mujoco.Renderer(m, 16, 16); r.update_scene(d); assert r.render().max() > 0; r.close()"
)
_REMEDY = """no OpenGL backend works for rendering; install one of
  apt-get install -y libegl1 libgl1-mesa-dri
  apt-get install -y libosmesa6
(with sudo where you are not root), then run this again"""


@functools.cache
def check_rendering() -> str:
    """Chooses EGL, else OSMesa, by drawing a picture in a child process; sets `MUJOCO_GL`; returns the backend's name.

    A backend named by `MUJOCO_GL` is tried first. Software rendering is kept to one thread per process.

    Raises:
      UserError: MuJoCo is not installed, or no backend draws; the message holds the install command.
    """
    if importlib.util.find_spec("mujoco") is None:
        raise UserError("MuJoCo is not installed; run: pip install 'wallwm_jax[sim]'")
    os.environ.setdefault("LP_NUM_THREADS", "1")
    if platform.system() != "Linux":
        return "native"
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    if asked and os.environ.get(_CHOSEN) == asked:
        return asked
    candidates = list(dict.fromkeys([asked, *BACKENDS] if asked else BACKENDS))
    if "mujoco" in sys.modules:  # too late to change: check what was chosen at import
        candidates = [asked]
    for backend in candidates:
        if _draws(backend):
            os.environ["MUJOCO_GL"] = os.environ[_CHOSEN] = backend
            return backend
    if "mujoco" in sys.modules:
        raise UserError(
            f"mujoco was imported with MUJOCO_GL={asked!r}, which does not draw here; "
            "call check_rendering() before importing mujoco, or set MUJOCO_GL=egl"
        )
    raise UserError(_REMEDY)


def _draws(backend: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return False
    return probe.returncode == 0


class SceneRenderer:
    """Renders square pictures of one compiled model; the model's visual meshes are decimated in place, once.

    Shadows, reflections, haze and multisampling are off: together with decimation they decide between 4 and 100
    pictures per second on one CPU core.
    """

    def __init__(self, model: Any, size: int, *, cell: float = CELL):
        """`model`: compiled MjModel with an off-screen buffer of `size` pixels or more; `cell` 0 keeps its meshes."""
        check_rendering()
        import mujoco

        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        if cell > 0:
            decimate_visual_meshes(model, cell)
        self._renderer = mujoco.Renderer(model, size, size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_HAZE):
            self._renderer.scene.flags[flag] = 0
        atexit.register(_close, weakref.ref(self))  # before EGL is torn down, which happens at exit, too

    def render(self, data: Any, camera: str) -> np.ndarray:
        """`[size, size, 3]` uint8 RGB from the named camera."""
        self._renderer.update_scene(data, camera)
        return self._renderer.render()

    def close(self) -> None:
        """Frees the GL context; harmless when repeated."""
        self._renderer.close()


def _close(reference: weakref.ref[SceneRenderer]) -> None:
    renderer = reference()
    if renderer is not None:
        renderer.close()


def decimate_visual_meshes(model: Any, cell: float = CELL, min_faces: int = MIN_FACES) -> tuple[int, int]:
    """Thins out the drawn triangles of every large mesh by vertex clustering; returns face counts (before, after).

    Vertices in one cube of side `cell` (metres) are drawn at the one nearest to their mean; triangles that collapse
    or repeat are dropped. Only `mesh_face*` and `mesh_facenum` change, which drawing alone reads: vertices, convex
    hulls and inertias stay, so physics is bit-identical.
    """
    before = int(model.mesh_facenum.sum())
    for mesh in range(model.nmesh):
        count = int(model.mesh_facenum[mesh])
        if count < min_faces:
            continue
        start = int(model.mesh_faceadr[mesh])
        first_vertex = int(model.mesh_vertadr[mesh])
        vertices = model.mesh_vert[first_vertex : first_vertex + int(model.mesh_vertnum[mesh])]
        faces = model.mesh_face[start : start + count]
        merged, kept = _cluster_faces(vertices, faces, cell)
        for name in ("mesh_facenormal", "mesh_facetexcoord"):
            table = getattr(model, name)
            if len(table):
                table[start : start + len(kept)] = table[start + kept]
        model.mesh_face[start : start + len(kept)] = merged
        model.mesh_facenum[mesh] = len(kept)
    return before, int(model.mesh_facenum.sum())


def _cluster_faces(vertices: np.ndarray, faces: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """vertices `[N, 3]`, faces `[F, 3]` to (faces between cluster representatives `[K, 3]`, their indices `[K]`)."""
    _, cluster = np.unique(np.floor(vertices / cell).astype(np.int64), axis=0, return_inverse=True)
    cluster = cluster.reshape(-1)
    size = np.bincount(cluster)
    mean = np.stack([np.bincount(cluster, vertices[:, axis]) for axis in range(3)], axis=1) / size[:, None]
    distance = np.square(vertices - mean[cluster]).sum(axis=1)
    by_cluster_then_distance = np.lexsort((distance, cluster))
    representative = by_cluster_then_distance[np.cumsum(size) - size]
    merged = representative[cluster[faces]]
    corners = np.sort(merged, axis=1)
    solid = np.flatnonzero((corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]))
    _, first = np.unique(corners[solid], axis=0, return_index=True)
    kept = solid[np.sort(first)]
    return merged[kept], kept


def camera_intrinsics(model: Any, camera: str, size: int) -> np.ndarray:
    """`[3, 3]` pinhole matrix in pixels of a square picture; pixel centres lie at +0.5."""
    focal = 0.5 * size / np.tan(0.5 * np.radians(float(model.camera(camera).fovy[0])))
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def camera_pose(data: Any, camera: str) -> np.ndarray:
    """`[4, 4]` world-from-camera pose, OpenCV axes (x right, y down, z forward), metres."""
    view = data.camera(camera)
    pose = np.eye(4)
    pose[:3, :3] = view.xmat.reshape(3, 3) * [1.0, -1.0, -1.0]  # MuJoCo cameras look along -z with y up
    pose[:3, 3] = view.xpos
    return pose


def project(points: np.ndarray, intrinsics: np.ndarray, world_from_camera: np.ndarray) -> np.ndarray:
    """World points `[..., 3]` to pixels `[..., 2]` (x right, y down); points must lie in front of the camera."""
    in_camera = (np.asarray(points) - world_from_camera[:3, 3]) @ world_from_camera[:3, :3]
    homogeneous = in_camera @ intrinsics.T
    return homogeneous[..., :2] / homogeneous[..., 2:]


def main() -> int:
    """Prints the backend's name on standard output and returns 0, or the remedy on standard error and returns 2."""
    try:
        print(check_rendering())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
