"""Extras: sim (OCBench, MetaWorld), data (LeRobot, RLDS), captions, vlm (tokenizer), serve, gcs, and for work here."""

from setuptools import find_packages, setup

SERVE = ["websockets>=14", "msgpack>=1.0.5"]
SIMULATOR = ["ocbench>=1.0.2,<2", "metaworld>=3.1.1,<3.2", "mujoco==3.3.0", "gymnasium>=1.1", "packaging"]
# crc32c makes tensorboardX's checksums of TFRecord files fast; the wheel of wordllama carries its model.
DATA = ["pyarrow>=18", "av>=14,<19", "crc32c>=2.7", "wordllama>=0.4,<0.5"]
CAPTIONS = ["httpx>=0.27"]
NOTEBOOKS = ["ipykernel>=6", "nbclient>=0.10", "nbformat>=5"]
GCS = ["gcsfs>=2026.4"]
VLM = ["tokenizers>=0.22"]
PARITY = ["torch>=2.6", "diffusers>=0.36", "transformers>=5", "safetensors>=0.4"]

setup(
    name="wallwm_jax",
    version="0.1.0",
    description="Event-grounded World Action Models, pretrained with JAX on TPU pods",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["wallwm_jax", "wallwm_jax.*"]),
    package_data={
        "wallwm_jax.evaluation": ["templates/*.j2"],
        "wallwm_jax.sources": ["embodiments/*.toml"],
    },
    install_requires=[  # jax as far as it is tested; from 0.11 on it needs Python 3.12
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.4",
        "grain>=0.2.18",
        "array-record>=0.8",
        "tensorflow-datasets>=4.9.10",
        "ml-collections>=1.1",
        "chex>=0.1.92",
        "absl-py>=2.1",
        "etils[epath]>=1.13",
        "fsspec",
        "numpy>=2.1",
        "scipy>=1.15",
        "scikit-learn>=1.5",
        "opencv-python-headless>=4.10",
        "simplejpeg>=1.8",
        "matplotlib>=3.9",
        "pillow>=10.1",
        "jinja2>=3.1",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tensorstore>=0.1.70",
        "threadpoolctl>=3.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "sim": SIMULATOR,
        "data": DATA,
        "captions": CAPTIONS,
        "vlm": VLM,
        "notebooks": NOTEBOOKS,
        "parity": PARITY,
        "gcs": GCS,
        "tpu": [  # the newest that is tested, so that an older one is replaced
            "jax[tpu]>=0.12,<0.13; python_version >= '3.12'",
            "jax[tpu]>=0.10.2,<0.11; python_version < '3.12'",
            *GCS,
        ],
        "gpu": ["jax[cuda12]>=0.10.2,<0.13"],
        "serve": SERVE,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "mypy>=1.11",
            "hypothesis>=6.100",
            "gcp-storage-emulator>=2026.7",
            *GCS,
            *CAPTIONS,
            *DATA,
            *SERVE,
            *NOTEBOOKS,
        ],
    },
)
