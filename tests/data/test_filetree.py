"""Files of a data set: folders and archives, honest or not."""

import zipfile

import pytest

from jmm_fast.data import filetree
from jmm_fast.data.filetree import FileTree
from jmm_fast.errors import UserError


@pytest.fixture
def archive(tmp_path):
    """``archive({name: bytes})``: a .zip that holds these members under exactly these names."""

    def make(members: dict[str, bytes]):
        path = tmp_path / "raw.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members.items():
                file.writestr(name, data)
        return path

    return make


def test_folder_and_archive_hold_the_same(tmp_path, archive):
    members = {"b/2.txt": b"two", "a.TXT": b"one", "b/c/3.txt": b"three", "b/other.csv": b"", "a.txt.swp": b""}
    for name, data in members.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "folder" / ".hidden.txt").write_bytes(b"")
    trees = FileTree(tmp_path / "folder", (".txt",)), FileTree(archive(members), (".txt",))
    for tree in trees:
        assert [(file.name, file.size) for file in tree.files] == [("a.TXT", 3), ("b/2.txt", 3), ("b/c/3.txt", 5)]
        assert [tree.read(file) for file in tree.files] == [b"one", b"two", b"three"]
        assert tree.files[1].stem == "2"


def test_a_single_file(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"one")
    tree = FileTree(tmp_path / "one.txt", (".txt",))
    assert [file.name for file in tree.files] == ["one.txt"] and tree.read(tree.files[0]) == b"one"


@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt", "/etc/outside.txt", "..\\outside.txt"])
def test_names_that_climb_out(archive, name):
    with pytest.raises(UserError, match=r"raw\.zip: member '.*outside\.txt' climbs out of the archive"):
        FileTree(archive({"fine.txt": b"", name: b"x"}), (".txt",))


def test_what_unpacks_to_too_much(archive, monkeypatch):
    monkeypatch.setattr(filetree, "MAX_FILE_BYTES", 1 << 20)
    tree = FileTree(archive({"bomb.txt": bytes(2 << 20), "fine.txt": b"x"}), (".txt",))
    assert tree.path.stat().st_size < 1 << 14
    with pytest.raises(UserError, match="it has 2097152 bytes, expected at most 1048576"):
        tree.read(tree.files[0])
    assert tree.read(tree.files[1]) == b"x"


def test_an_archive_that_lies_about_a_size(archive):
    path = archive({"liar.txt": bytes(2 << 20)})
    data = path.read_bytes()
    # The directory at the end says how large a member is.
    true, lie = (2 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")
    assert data.count(true) >= 1
    path.write_bytes(data.replace(true, lie))
    tree = FileTree(path, (".txt",))
    assert tree.files[0].size == 100
    with pytest.raises(UserError, match="cannot be read: "):
        tree.read(tree.files[0])


def test_damaged_archives(tmp_path, archive):
    path = archive({"a.txt": b"x" * 1000})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"raw\.zip: not a whole \.zip archive"):
        FileTree(path, (".txt",))
    at = whole.index(b"a.txt") + 8
    path.write_bytes(whole[:at] + bytes(byte ^ 255 for byte in whole[at : at + 3]) + whole[at + 3 :])
    tree = FileTree(path, (".txt",))
    with pytest.raises(UserError, match="cannot be read"):
        tree.read(tree.files[0])


def test_nothing_there(tmp_path, archive):
    with pytest.raises(UserError, match="absent: no such file or folder"):
        FileTree(tmp_path / "absent", (".txt",))
    for empty in (tmp_path, archive({"a.csv": b""})):
        with pytest.raises(UserError, match=r"no \.txt file in it"):
            FileTree(empty, (".txt",))


def test_a_file_that_is_gone(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x")
    tree = FileTree(tmp_path, (".txt",))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot be read: .*No such file"):
        tree.read(tree.files[0])
