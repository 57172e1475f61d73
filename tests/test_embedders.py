"""Where windows become points: captions by n-grams, sentences or the user's vectors, and what is said of bad ones."""

import shutil

import numpy as np
import pytest

from wallwm_jax.console import UserError
from wallwm_jax.data.clusters import FILE_NAME, check_cluster_again, cluster_again, cluster_store, load_clusters
from wallwm_jax.data.embedders import describe, open_embedder
from wallwm_jax.data.event_store import open_store


@pytest.fixture
def store(small_store, tmp_path):
    """A copy of the small store that may be clustered."""
    return shutil.copytree(small_store, tmp_path / "store")


def splits_of(path):
    return {split: open_store(path, split) for split in ("train", "heldout")}


def points(path, name):
    """Features of the first 40 train windows, `[40, D]`, and these windows."""
    splits = splits_of(path)
    seen = describe(splits["train"], np.arange(40))
    return open_embedder(name, splits).fit(splits["train"], seen, seed=0).features(splits["train"], seen), seen


def test_features_have_length_one_and_say_the_same_of_the_same_caption_and_picture(small_store):
    features, seen = points(small_store, "hashed")
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-6)
    same = seen.captions[:, None] == seen.captions[None]
    similar = features @ features.T
    assert similar[same].mean() > similar[~same].mean() + 0.3


def test_sentences_are_near_by_meaning_and_not_by_letters():
    pytest.importorskip("wordllama")
    from wallwm_jax.data.embedders import _hashed_words, _sentences

    texts = ["pick up the red cube", "lift the crimson block", "open the drawer", "pull the cabinet open"]
    texts += ["press the button", "push the switch", "pick up the red tube"]
    near = {}
    for name, words in (("sentences", _sentences), ("letters", _hashed_words)):
        rows = words(texts, 0)(texts)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        near[name] = rows @ rows.T
    # "lift the crimson block" and "pull the cabinet open" share no word with what they mean.
    assert near["sentences"][0, 1] > near["sentences"][1, 2:6].max()
    assert near["sentences"][2, 3] > near["sentences"][3, [0, 1, 4, 5]].max()
    assert near["letters"][0, 1] < near["letters"][1, 2:6].max()


def test_a_store_is_clustered_by_sentences_and_again_after_its_captions_changed(store):
    pytest.importorskip("wordllama")
    found = cluster_store(store, embedder="wordllama", seed=3, scale=1.0)
    assert found.made_by["embedder"]["name"] == "wordllama"
    assert load_clusters(store) == found
    content = (store / FILE_NAME).read_bytes()
    cluster_again(store)
    assert (store / FILE_NAME).read_bytes() == content


def test_vectors_of_windows_decide_alone_which_cluster_a_window_is_in(store, tmp_path):
    rng = np.random.default_rng(0)
    corners = 10 * np.eye(3, 8)
    labels = {}
    for split, opened in splits_of(store).items():
        labels[split] = rng.integers(0, 3, len(opened))
        vectors = corners[labels[split]] + rng.normal(0, 0.1, (len(opened), 8))
        np.save(tmp_path / f"vectors-{split}.npy", vectors.astype(np.float32))
    found = cluster_store(store, embedder=f"features:{tmp_path}/vectors-{{split}}.npy", scale=6.0)
    assert found.made_by["embedder"]["dimensions"] == 8
    for split, opened in splits_of(store).items():
        pairs = set(zip(opened.index["cluster_vl"].tolist(), labels[split].tolist()))
        assert len(pairs) == len({cluster for cluster, _ in pairs})  # no cluster has windows of two corners


@pytest.mark.parametrize("form", ["npy", "npz", "parquet"])
def test_vectors_of_captions_are_found_by_order_or_by_text(small_store, tmp_path, form):
    captions = open_store(small_store).captions
    vectors = np.eye(len(captions), dtype=np.float32)
    file, turned = tmp_path / f"captions.{form}", np.roll(np.arange(len(captions)), 5)
    if form == "npy":
        np.save(file, vectors)
    elif form == "npz":
        np.savez(file, caption=np.array(captions)[turned], features=vectors[turned])
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        columns = {"caption": [captions[row] for row in turned], "features": vectors[turned].tolist()}
        pyarrow.parquet.write_table(pa.table(columns), file)
    features, seen = points(small_store, f"features:{file}")
    assert (features[:, : len(captions)].argmax(1) == seen.captions).all()


def test_a_store_clustered_by_vectors_of_its_captions_is_not_clustered_by_them_again(store, tmp_path, monkeypatch):
    np.save(tmp_path / "captions.npy", np.eye(len(open_store(store).captions), dtype=np.float32))
    monkeypatch.chdir(tmp_path)
    found = cluster_store(store, embedder="features:captions.npy")
    assert found.made_by["embedder"]["name"] == f"features:{tmp_path}/captions.npy"  # from any folder
    before = (store / FILE_NAME).read_bytes()
    for again in (check_cluster_again, cluster_again):
        with pytest.raises(UserError, match=r"clustered by 'features:.*captions.npy'.*give --nocluster.*data.clusters"):
            again(store)
    assert (store / FILE_NAME).read_bytes() == before


def test_a_store_clustered_by_vectors_of_its_windows_is_clustered_by_them_again(store, tmp_path, monkeypatch):
    for split, opened in splits_of(store).items():
        vectors = np.random.default_rng(0).normal(size=(len(opened), 4))
        np.save(tmp_path / f"{split}.npy", vectors.astype(np.float32))
    monkeypatch.chdir(tmp_path)
    found = cluster_store(store, embedder="features:{split}.npy")
    monkeypatch.chdir("/")
    check_cluster_again(store)
    assert cluster_again(store) == found


def test_an_unknown_embedder_is_named(small_store):
    with pytest.raises(UserError, match="unknown embedder 'siglip'; choose of hashed, wordllama, features:FILE"):
        open_embedder("siglip", splits_of(small_store))


def test_a_package_that_is_not_there_is_named_with_the_command(small_store, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(UserError, match=r"'wordllama' is not installed: pip install 'wallwm_jax\[data\]'"):
        open_embedder("wordllama", splits_of(small_store))


def spoil(rows):
    rows[7, 2] = np.nan
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], r"train\.npy' has \d+ rows, the store \d+ windows; give one row for each"),
        (lambda rows: rows[0], r"must hold floating-point rows \[n, D\], not float32 \[4\]"),
        (lambda rows: rows.astype(np.int64), "not int64"),
        (spoil, "row 7 is not finite"),
    ],
)
def test_vectors_that_do_not_fit_are_named_before_anything_is_clustered(store, tmp_path, change, message):
    for split, opened in splits_of(store).items():
        np.save(tmp_path / f"{split}.npy", np.ones((len(opened), 4), np.float32))
    rows = np.ones((len(open_store(store)), 4), np.float32)
    np.save(tmp_path / "train.npy", change(rows))
    with pytest.raises(UserError, match=message):
        cluster_store(store, embedder=f"features:{tmp_path}/{{split}}.npy")
    assert not (store / FILE_NAME).exists()


def test_captions_without_vectors_and_files_of_another_kind_are_named(small_store, tmp_path):
    captions, splits = open_store(small_store).captions, splits_of(small_store)
    np.savez(tmp_path / "some.npz", caption=np.array(captions[1:]), features=np.ones((len(captions) - 1, 4)))
    with pytest.raises(UserError, match=f"lacks 1 of {len(captions)} captions of the store, such as {captions[0]!r}"):
        open_embedder(f"features:{tmp_path}/some.npz", splits)
    with pytest.raises(UserError, match="cannot be read"):
        open_embedder(f"features:{tmp_path}/none.npy", splits)
    with pytest.raises(UserError, match=r"ends in \.npy, \.npz or \.parquet"):
        open_embedder("features:vectors.csv", splits)
    np.savez(tmp_path / "other.npz", text=np.array(captions))
    with pytest.raises(UserError, match="cannot be read as columns caption and features"):
        open_embedder(f"features:{tmp_path}/other.npz", splits)
