"""From many files to one set of clips: order, threads, restarts, what is refused and what is logged."""

import fcntl
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jmm_fast import skeleton
from jmm_fast.data import ClipStore, collect, write_store
from jmm_fast.data.collect import FileLog, RawClip, first_clip
from jmm_fast.data.collect import collect as collecting
from jmm_fast.data.filetree import FileTree
from jmm_fast.data.transform import ClipTransform
from jmm_fast.errors import UserError

NTU = skeleton.get("ntu25")


class Recordings:
    """A file holds lines: NAME LABEL FRAMES [bad|nan|short|sure|unsure|outside]; its clips are made of the name."""

    class_names = None
    fps = 25.0
    identity = ("recordings", 1)

    def __init__(self, folder):
        self.tree = FileTree(folder, (".txt",))
        self.where, self.files, self.skeleton = str(folder), self.tree.files, NTU
        self.reads: list[str] = []
        self.threads: set[int] = set()
        self.before = lambda file: None

    def read(self, file, log):
        self.reads.append(file.name)
        self.threads.add(threading.get_ident())
        self.before(file)
        clips = []
        for number, line in enumerate(self.tree.read(file).decode().splitlines()):
            name, label, count, *kind = line.split()
            if kind == ["bad"]:
                raise UserError(f"line {number + 1}: expected a recording")
            rng = np.random.default_rng(list(name.encode()))
            frames = rng.normal(size=(1 + (label == "hug"), int(count), 25, 3)).astype(np.float32)
            confidence = None
            if kind == ["nan"]:
                frames[0, 0, 0, 0] = np.nan
            elif kind == ["sure"]:
                confidence = rng.random(frames.shape[:3]).astype(np.float32)
            elif kind == ["outside"]:
                confidence = np.full(frames.shape[:3], 1.5, np.float32)
            elif kind == ["noise"]:
                log.add("is noise", clip=name, body="7")
            columns = {"size": int(count), "speed": 0.5 * int(count), "place": name[0]}
            clips.append(RawClip(name=name, frames=frames, label=label, columns=columns, confidence=confidence))
        return clips

    def finish(self, contents):
        return []


@pytest.fixture(autouse=True)
def _two_files_a_run(monkeypatch):
    monkeypatch.setattr(collect, "CHUNK_FILES", 2)


@pytest.fixture
def folder(tmp_path):
    """Seven files, four runs, twelve clips."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(7):
        lines = [f"{'abc'[number % 3]}{number}{part} {'walk' if part else 'hug'} {4 + number}" for part in range(2)]
        (raw / f"f{number}.txt").write_text("\n".join(lines[: 1 + number % 3]) + "\n")
    return raw


def store(folder, out, **options):
    source = Recordings(folder)
    return gather(source, out, **options), source


def gather(source, out, **options):
    said = options.pop("said", [])
    with collecting(source, out, transform=ClipTransform(source=NTU), say=said.append, **options) as contents:
        write_store(out, contents)
    return ClipStore.open(out)


def work(out):
    return out.parent / f".{out.name}.work"


def test_clips_are_in_the_order_of_the_files(folder, tmp_path):
    made, source = store(folder, tmp_path / "s", workers=1)
    expected = [clip for file in source.files for clip in source.read(file, FileLog(file=file.name))]
    assert made.names == [clip.name for clip in expected] and len(made) == 11
    assert made.class_names == ["hug", "walk"] and made.fps == 25.0 and made.confidence is None
    for index, clip in enumerate(expected):
        np.testing.assert_array_equal(made.clip(index), clip.frames)
        assert made.class_names[made.labels[index]] == clip.label
        assert made.columns["size"][index] == clip.columns["size"]
        assert made.columns["speed"][index] == clip.columns["speed"]
        assert made.column_values["place"][made.columns["place"][index]] == clip.columns["place"]
    assert made.provenance == {"files": 7, "bytes": sum(file.size for file in source.files), "log": []}


def test_bytes_do_not_depend_on_threads(folder, tmp_path, monkeypatch):
    one, source = store(folder, tmp_path / "one", workers=1)
    assert len(source.threads) == 1
    assert len(source.reads) == 7 and not work(tmp_path / "one").exists()
    many = Recordings(folder)
    # The later a file, the sooner it is done.
    many.before = lambda file: time.sleep(0.02 * (7 - int(file.name[1])))
    gather(many, tmp_path / "many", workers=4)
    assert len(many.threads) > 1
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    monkeypatch.setattr(collect, "CHUNK_FILES", 512)
    monkeypatch.setattr(collect, "CHUNK_BYTES", 30)
    store(folder, tmp_path / "other", workers=3)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert one.num_clips == 11


class Crash(Exception):
    pass


def crashing(folder, name):
    source = Recordings(folder)

    def before(file):
        if file.name == name:
            raise Crash

    source.before = before
    return source


def test_what_was_read_is_not_read_again(folder, tmp_path):
    out, whole = tmp_path / "s", store(folder, tmp_path / "whole")[0]
    with pytest.raises(Crash):
        gather(crashing(folder, "f6.txt"), out, workers=1)
    assert not out.exists() and len(list(work(out).glob("*.npz"))) == 3
    said = []
    made, source = store(folder, out, workers=2, said=said)
    assert source.reads == ["f6.txt"]
    assert said == ["continuing: 6 of 7 files were read before"]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and made.fingerprint == whole.fingerprint
    assert not work(out).exists()


def test_a_crash_while_the_store_is_written_loses_nothing(folder, tmp_path):
    out = tmp_path / "s"
    with pytest.raises(Crash), collecting(Recordings(folder), out, transform=ClipTransform(source=NTU), say=print):
        raise Crash
    _, source = store(folder, out)
    assert source.reads == [] and not work(out).exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"PK" + data[2:100],
        lambda data: data[:2000] + bytes([data[2000] ^ 255]) + data[2001:],
    ],
    ids=["truncated", "empty", "start alone", "one byte of the frames"],
)
def test_a_damaged_run_is_read_again(folder, tmp_path, damage):
    out = tmp_path / "s"
    store(folder, tmp_path / "whole")
    with pytest.raises(Crash):
        gather(crashing(folder, "f6.txt"), out, workers=1)
    chunk = work(out) / "000001.npz"
    chunk.write_bytes(damage(chunk.read_bytes()))
    _, source = store(folder, out, workers=1)
    assert source.reads == ["f2.txt", "f3.txt", "f6.txt"]
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("change", ["contents", "new file", "gone", "options", "transform"])
def test_runs_of_other_files_or_options_are_not_used(folder, tmp_path, change):
    out = tmp_path / "s"
    with pytest.raises(Crash):
        gather(crashing(folder, "f6.txt"), out, workers=1)
    transform = ClipTransform(source=NTU)
    if change == "contents":
        (folder / "f0.txt").write_text("zz walk 9\n")
    elif change == "new file":
        (folder / "f9.txt").write_text("zz walk 9\n")
    elif change == "gone":
        (folder / "f5.txt").unlink()
    elif change == "transform":
        transform = ClipTransform(source=NTU, view=True)
    source = Recordings(folder)
    if change == "options":
        source.identity = ("recordings", 2)
    with collecting(source, out, transform=transform, say=print, workers=1) as contents:
        write_store(out, contents)
    assert source.reads == [file.name for file in source.files]
    assert ("zz" in ClipStore.open(out).names) == (change in ("contents", "new file"))


def test_two_at_once_are_refused_and_the_first_keeps_its_work(folder, tmp_path):
    out = tmp_path / "s"
    first = Recordings(folder)

    def before(file):
        # Before anything is on disk, and after.
        if file.name in ("f0.txt", "f3.txt"):
            with pytest.raises(UserError, match=r"s: another prepare is writing it$"):
                gather(Recordings(folder), out)
            assert (work(out) / "key").exists()

    first.before = before
    assert len(gather(first, out, workers=1)) == 11
    assert not work(out).exists()


def test_a_lock_left_by_a_killed_prepare_locks_nothing(folder, tmp_path):
    out = tmp_path / "s"
    work(out).mkdir()
    (work(out) / "lock").touch()
    assert len(store(folder, out)[0]) == 11
    work(out).mkdir()
    with open(work(out) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another prepare"):
            store(folder, out)


@pytest.mark.parametrize("workers", [1, 4])
def test_fail_names_the_first_bad_file_whatever_the_threads_do(folder, tmp_path, workers):
    for name in ("f3.txt", "f6.txt"):
        (folder / name).write_text("x walk 5\nx walk 5 bad\n")
    source = Recordings(folder)
    source.before = lambda file: time.sleep(0.05 * (file.name == "f3.txt"))
    with pytest.raises(UserError) as caught:
        gather(source, tmp_path / "s", workers=workers)
    where = str(folder)
    assert str(caught.value) == (
        f"{where}: f3.txt: line 2: expected a recording (--on-error drop leaves such files out)"
    )
    assert not (tmp_path / "s").exists()


def test_drop_leaves_out_and_logs(folder, tmp_path):
    (folder / "f3.txt").write_text("x walk 5\nx walk 5 bad\n")
    (folder / "f4.txt").write_text("p walk 5 nan\nq walk 1\nr walk 5 outside\nt walk 5 noise\n")
    made, _ = store(folder, tmp_path / "s", on_error="drop", workers=3)
    assert "x" not in made.names and "t" in made.names and len(made) == 11 - 1 - 2 + 1
    entry = {"file": "f4.txt", "body": ""}
    assert made.provenance["log"] == [
        {"file": "f3.txt", "clip": "", "body": "", "reason": "line 2: expected a recording"},
        {"file": "f4.txt", "clip": "t", "body": "7", "reason": "is noise"},
        {**entry, "clip": "p", "reason": "holds 1 NaN or infinite coordinates"},
        {**entry, "clip": "q", "reason": "has 1 frames with a body, expected at least 2"},
        {**entry, "clip": "r", "reason": "holds confidences outside [0, 1]"},
    ]
    with pytest.raises(UserError, match=r"f3\.txt: line 2"):
        store(folder, tmp_path / "s", on_error="fail")
    (folder / "f3.txt").write_text("x walk 5\n")
    with pytest.raises(UserError, match=r"f4\.txt: clip p holds 1 NaN .*drop leaves such clips out"):
        store(folder, tmp_path / "s", on_error="fail", workers=4)


def test_what_was_dropped_before_fails_when_asked_to(folder, tmp_path):
    """The runs of an interrupted drop hold no error that a later fail would pass over, and are used by a later drop."""
    (folder / "f0.txt").write_text("x walk 5 bad\n")
    out = tmp_path / "s"
    with pytest.raises(Crash):
        gather(crashing(folder, "f6.txt"), out, workers=1, on_error="drop")
    with pytest.raises(UserError, match=r"f0\.txt: line 1"):
        store(folder, out, on_error="fail", workers=1)
    made, source = store(folder, out, on_error="drop", workers=1)
    # The failed one may have read the last file before it was stopped.
    assert set(source.reads) <= {"f6.txt"} and made.provenance["log"][0]["file"] == "f0.txt"


def test_two_clips_of_one_name(folder, tmp_path):
    (folder / "f6.txt").write_text("a00 walk 8\nnew walk 4\n")
    with pytest.raises(UserError, match=r"clip a00: another clip has the same name, .*drop keeps the first\)"):
        store(folder, tmp_path / "s")
    made, _ = store(folder, tmp_path / "s", on_error="drop")
    assert made.names.count("a00") == 1 and made.lengths[made.names.index("a00")] == 4 and made.names[-1] == "new"
    reason = "another clip has the same name, expected one name a clip"
    assert made.provenance["log"] == [{"file": "", "clip": "a00", "body": "", "reason": reason}]


def test_a_selection_keeps_rows_columns_and_names_together(folder, tmp_path):
    whole, _ = store(folder, tmp_path / "whole")
    chosen = [1, 4, 5, 10]
    made, _ = store(folder, tmp_path / "s", select=lambda contents: np.array(chosen))
    assert made.names == [whole.names[clip] for clip in chosen]
    for clip, old in enumerate(chosen):
        np.testing.assert_array_equal(made.clip(clip), whole.clip(old))
        assert made.columns["size"][clip] == whole.columns["size"][old] and made.labels[clip] == whole.labels[old]


def test_confidence_of_some_clips(folder, tmp_path):
    (folder / "f3.txt").write_text("s hug 6 sure\nu hug 5\n")
    made, source = store(folder, tmp_path / "s", workers=2)
    assert made.confidence.shape == made.frames.shape[:2]
    for index, name in enumerate(made.names):
        rows = made.confidence[made.offsets[index] : made.offsets[index + 1]]
        if name != "s":
            assert (rows == 1).all()
            continue
        file = next(file for file in source.files if file.name == "f3.txt")
        (clip, _) = source.read(file, FileLog(file=file.name))
        np.testing.assert_array_equal(rows, clip.confidence.reshape(-1, 25).astype(np.float16))
    # Selected away with its clip, confidence is not stored.
    made, _ = store(folder, tmp_path / "t", select=lambda contents: np.arange(4))
    assert made.confidence is None


def test_nothing_to_read(folder, tmp_path):
    for file in folder.iterdir():
        file.write_text("x walk 5 bad\n")
    with pytest.raises(UserError, match=r"no usable clip in 7 files: f0\.txt: line 1: expected a recording"):
        store(folder, tmp_path / "s", on_error="drop")
    with pytest.raises(UserError, match="no usable clip in 7 files"):
        first_clip(Recordings(folder))
    source = Recordings(folder)
    source.files = []
    with pytest.raises(UserError, match="no file to read"):
        gather(source, tmp_path / "s")


def test_the_first_clip_is_the_first_usable_one(folder):
    (folder / "f0.txt").write_text("x walk 5 bad\n")
    (folder / "f1.txt").write_text("y walk 5 nan\nz walk 5\n")
    assert first_clip(Recordings(folder)).name == "z"


@pytest.mark.parametrize(("limit", "stage"), [(2000, "a run"), (20_000, "the store")])
def test_a_full_disk_leaves_no_store_and_one_line(folder, tmp_path, limit, stage):
    out = tmp_path / "s"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # a write past it fails as on a full disk
    try:
        with pytest.raises(UserError, match="cannot write") as caught:
            store(folder, out, workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (".work" in str(caught.value)) == (stage == "a run") and "\n" not in str(caught.value)
    assert not out.exists()
    assert work(out).exists() == (stage == "the store"), "runs stay for the next try, an empty work folder does not"
    _, source = store(folder, out)
    assert len(source.reads) == (7 if stage == "a run" else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw", "s"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(folder, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(UserError, match=r"cannot write .*: Permission denied"):
        store(folder, closed / "s")


def test_a_folder_that_is_a_file(folder, tmp_path):
    Path(tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/s: "):
        store(folder, tmp_path / "file" / "s")
