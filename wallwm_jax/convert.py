r"""Converts published weights into checkpoints of this package, and back.

Wan's video transformer, from the diffusers repository or the original one (single file or shards with their index):

    python -m wallwm_jax.convert wan --source=Wan2.2-TI2V-5B-Diffusers --out=weights/wan22_5b

Its video codec, and the text encoder with its tokenizer:

    python -m wallwm_jax.convert wan_vae --source=Wan2.2-TI2V-5B-Diffusers --out=weights/wan22_vae
    python -m wallwm_jax.convert umt5 --source=Wan2.2-TI2V-5B-Diffusers --out=weights/umt5

The vision-language model Qwen3.5 with its tokenizer; the `mtp.*` head of published weights is kept, unused, for the way
back:

    python -m wallwm_jax.convert qwen3_5 --source=Qwen3.5-4B --out=weights/qwen35_4b

Back to the very same files:

    python -m wallwm_jax.convert wan --source=weights/wan22_5b --out=restored --to=safetensors

Weights keep their dtype and are never in memory as a whole. --out appears only when it is complete; tensors.tsv in it
lists every tensor with shape, dtype, checksum and the parameter it became. A missing, left-over or misshapen tensor is
an error that names it.
"""

from __future__ import annotations

from absl import app, flags

from wallwm_jax.console import phase, run_command

_KINDS = ("wan", "wan_vae", "umt5", "qwen3_5")


def _define_flags() -> None:
    flags.DEFINE_string(
        "source", None, "Folder of the weights; a repository with them in their usual sub-folder will do."
    )
    flags.DEFINE_string("out", None, "Folder to make; it must not exist.")
    flags.DEFINE_enum("to", "orbax", ["orbax", "safetensors"], "What to make of the source.")
    flags.mark_flags_as_required(["source", "out"])


def main(argv: list[str]) -> None:
    if len(argv) != 2 or argv[1] not in _KINDS:
        raise app.UsageError(f"say what to convert: python -m wallwm_jax.convert {{{','.join(_KINDS)}}} --source --out")
    from wallwm_jax.models.convert import stream  # heavy; --help should not wait for it

    kind, source, out = argv[1], flags.FLAGS.source, flags.FLAGS.out
    convert = stream.import_weights if flags.FLAGS.to == "orbax" else stream.export_weights
    with phase(f"convert {kind} weights from {source} to {flags.FLAGS.to}"):
        summary = convert(kind, source, out)
    print(
        f"{out}: {summary.tensors} tensors, {summary.parameters:,} parameters, {summary.bytes / 1e9:.2f} GB, "
        f"{summary.layout} layout"
    )


if __name__ == "__main__":
    _define_flags()
    run_command(main, positional=1)
