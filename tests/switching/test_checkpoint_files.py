"""Files that are whole or are refused: cut, altered, too new, of others, written twice at once."""

import collections
import fcntl
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from halfstep.errors import CheckpointError
from halfstep.switching import checkpoint_files
from halfstep.switching.checkpoint_files import read_file, write_file

CONTENT = {
    "weights": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -0.0, torch.inf], dtype=torch.float16),
    "list": [1, 2.5, True, None, "text", b"bytes", 1 + 2j, {"a": {1, 2}}],
    "tuple": (3, (4,)),
    "counter": collections.Counter("abba"),
    "shape": torch.Size([2, 3]),
    7: torch.bfloat16,
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.pt"
    write_file(path, CONTENT)
    return path


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def test_what_is_written_is_read(file):
    assert same(read_file(file), CONTENT)


def test_torch_reads_it_without_code(file):
    assert same(torch.load(file, weights_only=True), CONTENT)


def test_a_bit_flipped_in_any_region_is_refused(file):
    whole = bytearray(file.read_bytes())
    bits = random.Random(0)
    for place in (*range(0, len(whole) - 300, 7), *range(len(whole) - 300, len(whole), 2)):
        bit = 1 << bits.randrange(8)
        whole[place] ^= bit
        file.write_bytes(whole)
        with pytest.raises(CheckpointError, match=r"altered|no checkpoint"):
            read_file(file)
        whole[place] ^= bit
    file.write_bytes(whole)
    assert same(read_file(file), CONTENT)


def test_a_file_cut_short_anywhere_is_refused(file):
    whole = file.read_bytes()
    for size in (*range(0, len(whole), 7), len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut short|is no checkpoint of halfstep"):
            read_file(file)


def test_bytes_added_are_seen(file):
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="cut short or altered"):
        read_file(file)


def test_a_newer_version_says_so(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    monkeypatch.setattr(checkpoint_files, "_VERSION", 2)
    write_file(path, CONTENT)
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint of version 2; this halfstep reads version 1 and"
    ):
        read_file(path)


def test_another_programs_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("epoch,loss\n" * 50)
    with pytest.raises(CheckpointError, match=r"\(550 bytes\) is no checkpoint of halfstep"):
        read_file(path)
    torch.save({"a": 1}, path)
    with pytest.raises(CheckpointError, match="or another program wrote it"):
        read_file(path)


class Mine:
    pass


class MyTensor(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            Mine(),
            r"content\['more'\]\[0\] is a \S*Mine: a checkpoint holds tensors, numbers and text",
        ),
        (len, "is a builtins.builtin_function_or_method"),
        (np.ones(2), "is a numpy.ndarray.*torch.from_numpy"),
        (torch.ones(2).as_subclass(MyTensor), "is a MyTensor: a checkpoint holds plain tensors"),
        (2**5000, "is an int of 5001 bits; at most 2000"),
        ({(1, 2): 3}, r"has the key \(1, 2\), a tuple"),
    ],
)
def test_what_is_no_plain_data_is_refused_and_the_old_file_stays(file, value, says):
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=says):
        write_file(file, {"more": [value]})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_numpys_numbers_are_pythons(tmp_path):
    write_file(tmp_path / "a", {"best": np.float64(0.5), "n": np.int32(3), "yes": np.bool_(True)})
    assert same(read_file(tmp_path / "a"), {"best": 0.5, "n": 3, "yes": True})


def test_a_slice_is_written_by_itself(tmp_path):
    write_file(tmp_path / "a", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "a").stat().st_size < 10_000


def test_shared_tensors_are_written_once(tmp_path):
    big = torch.zeros(100_000)
    write_file(tmp_path / "a", {"a": big, "b": big})
    assert (tmp_path / "a").stat().st_size < 500_000


def test_a_full_disk_leaves_the_old_file(file):
    """A limit on the size of files stands for the disk: the write really fails, in the middle."""
    before = file.read_bytes()
    code = (
        "import pathlib, resource, signal, sys, torch\n"
        "from halfstep.switching.checkpoint_files import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "write_file(pathlib.Path(sys.argv[1]), {'a': torch.zeros(1_000_000)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr or "PytorchStreamWriter" in done.stderr, done.stderr
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_what_a_killed_process_left_is_overwritten(file):
    (file.parent / ".run.pt.partial").write_bytes(b"half a file" * 1000)
    write_file(file, {"a": 1})
    assert read_file(file) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


def test_two_writers_of_one_file(file):
    with (file.parent / ".run.pt.partial").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(
            CheckpointError, match=r"another process is writing .*run.pt at this mom"
        ):
            write_file(file, {"a": 1})
    assert same(read_file(file), CONTENT)


def test_a_link_stays_a_link(file):
    link = file.parent / "latest.pt"
    link.symlink_to(file)
    write_file(link, {"a": 1})
    assert link.is_symlink()
    assert read_file(file) == {"a": 1}


def test_the_file_has_the_users_permissions(tmp_path):
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "a", {})
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
