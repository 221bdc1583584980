import hashlib
import logging
import math
import pickle
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tessera.data import corpus as corpus_module
from tessera.data.corpus import (
    Corpus,
    LazyImages,
    ManifestCorpus,
    load_images,
    open_corpus,
    open_images,
    read_views,
)
from tessera.data.ingest import ingest
from tessera.data.views import Views, cut_views
from tessera.errors import UserError

SIZE = (16, 24)


def save_pairs(root: Path, count: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:03}.png")
        (root / f"{number:03}.txt").write_text(f"picture {number}")


def original(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_pairs(tmp_path / "photos", 8)  # too few for a validation split: all are for training
    return tmp_path / "photos"


@pytest.fixture
def corpus(folder: Path) -> ManifestCorpus:
    return ManifestCorpus(ingest(folder), image_size=SIZE)


class Counted:
    """A corpus of flat pictures that counts how often it is asked."""

    name = "counted"
    image_size: tuple[int, int] = (8, 8)

    def __init__(self, count: int) -> None:
        self.count = count
        self.num_images = 0

    def __len__(self) -> int:
        return self.count

    def captions(self, index: int) -> tuple[str, ...]:
        return (str(index),)

    def image(self, index: int) -> np.ndarray:
        self.num_images += 1
        return np.full((8, 8, 3), index % 256, np.uint8)

    def fingerprint(self) -> str:
        return hashlib.sha256(bytes([self.count % 256])).hexdigest()


def test_a_folder_is_a_corpus(folder: Path) -> None:
    corpus = open_corpus(str(folder), image_size=SIZE, split="train")
    assert (len(corpus), corpus.name, corpus.image_size) == (8, "photos", SIZE)
    for index in range(8):
        assert corpus.captions(index) == (f"picture {index}",)
        image = corpus.image(index)
        assert image.dtype == np.uint8 and image.flags.c_contiguous
        assert (image == original(index)).all()


def test_images_are_cropped_to_the_size_of_the_corpus(folder: Path) -> None:
    corpus = open_corpus(str(folder), image_size=(8, 8), split="train")
    wanted = Image.fromarray(original(0)[:, 4:20]).resize((8, 8), Image.Resampling.LANCZOS)
    # At the edges the filter reaches into what was cropped away.
    assert np.abs(corpus.image(0).astype(int) - np.asarray(wanted))[:, 2:-2].max() <= 2


def test_train_and_validation_share_no_image(tmp_path: Path) -> None:
    save_pairs(tmp_path / "data", 40)
    train, validation = (
        open_corpus(str(tmp_path / "data"), image_size=SIZE, split=split, cache_dir=tmp_path / "run")
        for split in ("train", "validation")
    )
    assert len(train) + len(validation) == 40 and len(validation) >= 1
    captions = [{corpus.captions(index) for index in range(len(corpus))} for corpus in (train, validation)]
    assert not captions[0] & captions[1]
    assert (tmp_path / "run" / "manifest.jsonl").exists()


def test_a_handful_of_images_serves_both_splits(folder: Path) -> None:
    assert len(open_corpus(str(folder), image_size=SIZE, split="validation")) == 8


def test_a_limit_keeps_some_in_their_order_and_always_the_same(folder: Path) -> None:
    captions = []
    for limit in (3, 5, 100):
        corpus = open_corpus(str(folder), image_size=SIZE, split="train", limit=limit)
        captions.append([corpus.captions(index)[0] for index in range(len(corpus))])
    assert [len(kept) for kept in captions] == [3, 5, 8]
    assert set(captions[0]) < set(captions[1]) < set(captions[2])
    assert all(kept == sorted(kept) for kept in captions)


def test_the_fingerprint_follows_pixels_captions_and_size(folder: Path) -> None:
    def fingerprint(size: tuple[int, int] = SIZE) -> str:
        return ManifestCorpus(ingest(folder), image_size=size).fingerprint()

    first = fingerprint()
    assert fingerprint() == first and len(first) == 64
    assert fingerprint((8, 8)) != first
    (folder / "003.txt").write_text("another caption")
    second = fingerprint()
    assert second != first
    Image.new("RGB", (9, 9)).save(folder / "004.png")
    assert fingerprint() not in (first, second)


def test_files_that_changed_are_replaced_by_the_next_good_one(
    corpus: ManifestCorpus, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "002.png").unlink()
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:-20])
    (folder / "007.png").write_bytes((folder / "006.png").read_bytes())  # sound, but no longer what was checked
    with caplog.at_level(logging.WARNING):
        images = [corpus.image(index) for index in range(8)]
    for index, shown in enumerate([0, 1, 4, 4, 4, 5, 6, 0]):
        assert (images[index] == original(shown)).all()
        assert corpus.captions(index) == (f"picture {shown}",)
    assert corpus.substitutes == {2: 4, 3: 4, 7: 0} and corpus.num_substituted == 3
    assert len(caplog.records) == 1 and "002.png: cannot be read" in caplog.text


def test_substitutes_do_not_depend_on_the_order_of_reading(corpus: ManifestCorpus, folder: Path) -> None:
    for number in (1, 2, 6):
        (folder / f"{number:03}.png").unlink()
    for index in (6, 2, 7, 1):
        corpus.image(index)
    assert corpus.substitutes == {6: 7, 2: 3, 1: 3}


def test_a_substitute_that_breaks_too_is_replaced(corpus: ManifestCorpus, folder: Path) -> None:
    (folder / "000.png").unlink()
    corpus.image(0)
    (folder / "001.png").unlink()
    assert (corpus.image(0) == original(2)).all() and corpus.captions(0) == ("picture 2",)


def test_a_corpus_that_is_gone_is_an_error_of_one_line(corpus: ManifestCorpus, folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"no image of .*photos can be read any more: 005\.png: cannot be read"):
        corpus.image(5)


def test_a_file_that_became_a_link_to_the_outside_is_not_followed(
    corpus: ManifestCorpus, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "000.png").unlink()
    (folder / "000.png").symlink_to(tmp_path / "secret.png")
    assert (corpus.image(0) == original(1)).all()


def test_a_corpus_travels_to_worker_processes(corpus: ManifestCorpus) -> None:
    copy = pickle.loads(pickle.dumps(corpus))
    assert (copy.image(3) == corpus.image(3)).all() and copy.fingerprint() == corpus.fingerprint()


@pytest.mark.parametrize("count", [1, 300])
def test_all_images_come_in_one_array(count: int, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    images = load_images(Counted(count), on_progress=lambda done, total: told.append((done, total)))
    assert images.shape == (count, 8, 8, 3) and images.dtype == np.uint8
    assert (images[:, 0, 0, 0] == np.arange(count) % 256).all()
    assert told[-1] == (count, count)
    assert (load_images(Counted(count), directory=tmp_path) == images).all()


def test_a_second_load_reads_the_file_of_the_first(tmp_path: Path) -> None:
    first, second, other = Counted(20), Counted(20), Counted(21)
    images = load_images(first, directory=tmp_path / "cache")
    assert isinstance(images, np.memmap) and not images.flags.writeable
    assert (load_images(second, directory=tmp_path / "cache") == images).all()
    assert (first.num_images, second.num_images) == (20, 0)
    assert len(load_images(other, directory=tmp_path / "cache")) == 21
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_a_damaged_file_of_images_is_made_again(tmp_path: Path, damage: bytes | None) -> None:
    images = np.array(load_images(Counted(20), directory=tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)
    assert (load_images(Counted(20), directory=tmp_path) == images).all()


def test_an_interrupted_load_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(Counted):
        def image(self, index: int) -> np.ndarray:
            if index == 290:
                raise KeyboardInterrupt
            return super().image(index)

    with pytest.raises(KeyboardInterrupt):
        load_images(Interrupted(300), directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_with_substitutes_are_not_reused(folder: Path, tmp_path: Path) -> None:
    manifest = ingest(folder)
    (folder / "002.png").unlink()
    for _ in range(2):  # captions of a fresh corpus must fit, so it has to find the substitutes itself
        corpus = ManifestCorpus(manifest, image_size=SIZE)
        images = load_images(corpus, directory=tmp_path / "cache")
        assert (images[2] == original(3)).all() and corpus.captions(2) == ("picture 3",)


def test_what_would_fill_the_memory_is_decoded_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Counted(20)
    size = 20 * math.prod(corpus.image_size) * 3
    monkeypatch.setattr("tessera.data.corpus.usable_memory_bytes", lambda: 4 * size)
    assert isinstance(open_images(corpus, directory=None, most_gib=1.0), np.ndarray)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isinstance(open_images(corpus, directory=None, most_gib=1.0), LazyImages)


def test_images_that_fit_are_an_array_and_others_are_decoded_when_needed(
    corpus: ManifestCorpus, tmp_path: Path
) -> None:
    gib = 8 * SIZE[0] * SIZE[1] * 3 / 2**30
    assert isinstance(open_images(corpus, directory=tmp_path, most_gib=gib), np.memmap)
    assert isinstance(open_images(corpus, directory=None, most_gib=1.0), np.ndarray)
    lazy = open_images(corpus, directory=tmp_path / "lazy", most_gib=gib * 0.99)
    assert isinstance(lazy, LazyImages) and not (tmp_path / "lazy").exists()
    array = load_images(corpus)
    assert (lazy.shape, lazy.dtype, len(lazy)) == (array.shape, array.dtype, len(array))
    for rows in ([5, 0, 5], np.array([7, 1]), [], slice(2, 7, 2), slice(None, 100)):
        assert (lazy[rows] == array[rows]).all() and lazy[rows].shape == array[rows].shape


def test_lazy_images_travel_to_worker_processes_and_name_wrong_rows(corpus: ManifestCorpus) -> None:
    lazy = pickle.loads(pickle.dumps(LazyImages(corpus)))
    assert (lazy[[3]][0] == original(3)).all()
    for rows in ([8], [-1], [[0, 1]], [0, 99]):
        with pytest.raises(IndexError, match=r"expected a list of rows in \[0, 8\)"):
            lazy[rows]


def test_lazy_images_leave_no_thread_behind_and_replace_what_is_gone(corpus: ManifestCorpus, folder: Path) -> None:
    (folder / "002.png").unlink()
    before = threading.active_count()
    assert (LazyImages(corpus)[[2, 1]] == np.stack([original(3), original(1)])).all()
    assert threading.active_count() == before and corpus.num_substituted == 1


def test_lazy_images_decode_no_more_of_a_photograph_than_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((400, 600, 3), np.uint8)).save(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "a.txt").write_text("black")
    decoded: list[tuple[int, int]] = []

    def fit(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        decoded.append(image.size)
        return np.zeros((*size, 3), np.uint8)

    monkeypatch.setattr("tessera.data.manifest_corpus.fit_to", fit)
    LazyImages(ManifestCorpus(ingest(tmp_path / "photos"), image_size=(32, 32)))[[0]]
    assert decoded == [(150, 100)], "a quarter of the size"


def all_views(
    corpus: Corpus,
    views: Views,
    *,
    batch_size: int = 3,
    start: int = 0,
    directory: Path | None = None,
    ahead: bool = False,
) -> np.ndarray:
    batches = read_views(corpus, views, batch_size=batch_size, start=start, directory=directory, ahead=ahead)
    return np.concatenate(list(batches))


def test_views_are_the_same_in_any_batches_from_any_start(corpus: ManifestCorpus) -> None:
    views = Views(count=3, seed=5)
    whole = all_views(corpus, views)
    assert whole.shape == (8, 3, *SIZE, 3)
    assert (all_views(corpus, views, batch_size=100) == whole).all()
    assert (all_views(corpus, views, batch_size=1, start=5) == whole[5:]).all()
    assert (all_views(corpus, views, batch_size=2, start=5, ahead=True) == whole[5:]).all()
    assert [len(batch) for batch in read_views(corpus, Views(), batch_size=3, start=1)] == [3, 3, 1]
    for index in range(8):
        assert (whole[index, 0] == corpus.image(index)).all()
        assert (whole[index] == cut_views(corpus.picture(index), SIZE, views, index=index)).all()


def test_images_that_were_loaded_before_are_not_made_again(tmp_path: Path) -> None:
    load_images(Counted(20), directory=tmp_path)
    drawn, loaded = Counted(20), Counted(20)
    for views in (Views(), Views(count=2)):
        assert (all_views(loaded, views, start=7, directory=tmp_path) == all_views(drawn, views, start=7)).all()
    assert (drawn.num_images, loaded.num_images) == (26, 0)


def test_crops_of_files_are_cut_from_all_their_pixels(folder: Path, tmp_path: Path) -> None:
    corpus = ManifestCorpus(ingest(folder), image_size=(8, 8))
    load_images(corpus, directory=tmp_path)
    views = Views(count=2)
    assert (all_views(corpus, views, directory=tmp_path) == all_views(corpus, views)).all()
    (folder / "000.png").unlink()
    assert (all_views(corpus, Views(), directory=tmp_path)[0, 0] != corpus.image(1)).any(), "read from the array"


def test_captions_follow_the_pictures_of_a_batch(corpus: ManifestCorpus, folder: Path) -> None:
    (folder / "003.png").unlink()
    captions = []
    with closing(read_views(corpus, Views(count=2), batch_size=2)) as batches:
        for pictures in batches:
            captions += [corpus.captions(len(captions) + number)[0] for number in range(len(pictures))]
    assert captions == [f"picture {number}" for number in (0, 1, 2, 4, 4, 5, 6, 7)]


@pytest.mark.parametrize(("ahead", "read"), [(False, [2, 4]), (True, [2 + 4, 4 + 4])])
def test_only_who_wants_it_has_pictures_read_while_busy(ahead: bool, read: list[int]) -> None:
    corpus = Counted(20)
    with closing(read_views(corpus, Views(), batch_size=2, ahead=ahead)) as batches:
        for most in read:
            next(batches)
            deadline = time.monotonic() + 10
            while corpus.num_images < most and time.monotonic() < deadline:
                time.sleep(0.001)
            assert corpus.num_images == most
    assert (all_views(Counted(20), Views(), ahead=ahead)[:, 0, 0, 0, 0] == np.arange(20)).all()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_reader_that_stops_early_leaves_no_thread_behind(ahead: bool, corpus: ManifestCorpus) -> None:
    before = threading.active_count()
    with closing(read_views(corpus, Views(), batch_size=1, ahead=ahead)) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize("split", ["train", "validation"])
def test_scenes_open_by_name(split: str) -> None:
    corpus: Corpus = open_corpus("scenes", image_size=(32, 48), split=split, seed=3, limit=5)  # type: ignore[arg-type]
    assert len(corpus) == 5 and corpus.image(4).shape == (32, 48, 3)
    assert len(open_corpus("scenes", image_size=(32, 32), split=split)) == corpus_module.NUM_SCENES[split]  # type: ignore[arg-type]


def test_a_wrong_name_is_answered_with_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no data 'scene': expected scenes, emoji, a folder of captioned images, a .tar"
    ):
        open_corpus("scene", image_size=SIZE, split="train")
    with pytest.raises(UserError, match="the image size must be positive, got 0x64"):
        open_corpus("scenes", image_size=(0, 64), split="train")
    with pytest.raises(UserError, match="the limit must be at least 1 picture, got 0"):
        open_corpus("scenes", image_size=SIZE, split="train", limit=0)
