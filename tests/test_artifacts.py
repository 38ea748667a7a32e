"""Files of ours: atomic, versioned, and refused with one clear line when damaged."""

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from teal import artifacts
from teal.artifacts import (
    cached,
    check_header,
    check_keys,
    check_writable,
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from teal.errors import TealError


def raising(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


class TestWriting:
    def test_makes_directories_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "c.json"
        write_json(path, {"x": 1})
        assert read_json(path) == {"x": 1}
        assert [entry.name for entry in path.parent.iterdir()] == ["c.json"]

    def test_others_may_read_what_the_umask_allows(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            write_json(tmp_path / "x.json", {})
            write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)}, {})
        finally:
            os.umask(before)
        assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o640, 0o640]

    def test_replaces_a_file(self, tmp_path: Path) -> None:
        for value in (1, 2):
            write_json(tmp_path / "x.json", {"x": value})
        assert read_json(tmp_path / "x.json") == {"x": 2}

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            pytest.param(errno.ENOSPC, "No space left on device", id="disk-full"),
            pytest.param(errno.EACCES, "Permission denied", id="no-permission"),
            pytest.param(errno.EROFS, "Read-only file system", id="read-only"),
        ],
    )
    @pytest.mark.parametrize("kind", ["json", "tensors"])
    def test_failure_leaves_the_old_file_intact(
        self, tmp_path: Path, kind: str, number: int, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "x"

        def write(value: int) -> None:
            if kind == "json":
                write_json(path, {"x": value})
            else:
                write_tensors(path, {"x": torch.tensor(value)}, {})

        write(1)
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", raising(number))
            patch.setattr(artifacts, "save_file", raising(number))
            with pytest.raises(TealError, match=rf"cannot write .*/x: {message}"):
                write(2)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["x"]

    def test_interrupted_while_writing_leaves_the_old_file_intact(self, tmp_path: Path) -> None:
        path = tmp_path / "x.json"
        write_json(path, {"x": 1})

        def half(temporary: Path) -> None:
            temporary.write_text('{"x":')
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, half)
        assert read_json(path) == {"x": 1}
        assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]

    def test_what_a_killed_process_left_goes_with_the_next_write(self, tmp_path: Path) -> None:
        """In the middle of writing a safetensors file, which has a temporary name of its own. Others' files stay."""
        code = """
import os, signal, sys, time
from pathlib import Path
from teal.artifacts import write_atomically
def stop(temporary):
    (temporary.parent / ".tmpE4xq7P").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), stop)
"""
        path = tmp_path / "x.safetensors"
        writers = [
            subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE)
            for target in (path, path, tmp_path / "y.safetensors")
        ]
        try:
            for writer in writers:
                assert writer.stdout is not None
                assert writer.stdout.readline() == b"writing\n"
            (tmp_path / f".x.safetensors.{platform.node()}-notes.tmp").mkdir()
            (tmp_path / ".x.safetensors.elsewhere-1-abc.tmp").mkdir()  # of another host, which we cannot ask
            killed, alive, other = writers
            for writer in (killed, other):
                writer.kill()
                writer.wait()
            before = {entry.name for entry in tmp_path.iterdir()}
            write_tensors(path, {"x": torch.ones(1)}, {})
            gone = before - {entry.name for entry in tmp_path.iterdir()}
            assert [f"-{killed.pid}-" in name for name in gone] == [True]
            assert alive.poll() is None
        finally:
            for writer in writers:
                writer.kill()
                writer.communicate()

    def test_no_permission_to_make_the_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "mkdir", raising(errno.EACCES))
        with pytest.raises(TealError, match="Permission denied"):
            write_json(tmp_path / "a" / "x.json", {})

    def test_a_directory_in_its_place(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match="it is a directory; name a file"):
            write_json(tmp_path, {})

    def test_a_file_in_place_of_its_directory(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("")
        with pytest.raises(TealError, match=r"cannot write .*a/x.json"):
            write_json(tmp_path / "a" / "x.json", {})

    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    def test_not_finite_is_never_written(self, tmp_path: Path, value: float) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "x.json", {"x": value})
        assert not list(tmp_path.iterdir())


class TestCheckWritable:
    def test_where_nothing_exists_yet(self, tmp_path: Path) -> None:
        check_writable(tmp_path / "a" / "b" / "c.json")
        assert not list(tmp_path.iterdir())

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match="it is a directory; name a file"):
            check_writable(tmp_path)

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("")
        with pytest.raises(TealError, match=r"no permission to write in .*/a"):
            check_writable(tmp_path / "a" / "x.json")

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)
        with pytest.raises(TealError, match=f"no permission to write in {tmp_path}"):
            check_writable(tmp_path / "x.json")


class TestReadJson:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(b'{"x": 1', "is not valid JSON", id="truncated"),
            pytest.param(b"", "is not valid JSON", id="empty"),
            pytest.param(b"[1, 2]", "holds no JSON object", id="list"),
            pytest.param(b'{"x": NaN}', "holds NaN; it is damaged", id="nan"),
            pytest.param(b'{"x": -Infinity}', "holds -Infinity; it is damaged", id="infinity"),
            pytest.param(b"\x80\x04\x95", "is not JSON but binary", id="pickle"),
        ],
    )
    def test_damaged(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(TealError, match=message) as error:
            read_json(path)
        assert str(path) in str(error.value)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match=r"x\.json does not exist"):
            read_json(tmp_path / "x.json")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match="is a directory; name the file in it"):
            read_json(tmp_path)

    def test_no_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "read_text", raising(errno.EACCES))
        with pytest.raises(TealError, match=r"cannot read .*: Permission denied"):
            read_json(tmp_path / "x.json")


TENSORS = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(3, dtype=torch.int64)}


class TestTensors:
    def test_round_trip(self, tmp_path: Path) -> None:
        write_tensors(tmp_path / "x", TENSORS, {"format": "f", "list": [1, None, "ü"]})
        tensors, header = read_tensors(tmp_path / "x")
        assert header == {"format": "f", "list": [1, None, "ü"]}
        assert set(tensors) == {"a", "b"}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated(self, tmp_path: Path, kept: int) -> None:
        path = tmp_path / "x"
        write_tensors(path, TENSORS, {})
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(TealError, match="is truncated, corrupt or not safetensors"):
            read_tensors(path)

    def test_pickle(self, tmp_path: Path) -> None:
        torch.save(TENSORS, tmp_path / "x")
        with pytest.raises(TealError, match="not safetensors"):
            read_tensors(tmp_path / "x")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match="x does not exist"):
            read_tensors(tmp_path / "x")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(TealError, match="is a directory"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize(("text", "message"), [("{", "corrupt"), ("[]", "no JSON object")], ids=["damaged", "list"])
    def test_header_that_is_none(self, tmp_path: Path, text: str, message: str) -> None:
        save_file({"b": TENSORS["b"]}, tmp_path / "x", {"teal": text})
        with pytest.raises(TealError, match=message):
            read_tensors(tmp_path / "x")

    def test_no_header(self, tmp_path: Path) -> None:
        save_file({"b": TENSORS["b"]}, tmp_path / "x")
        assert read_tensors(tmp_path / "x")[1] == {}


class TestChecks:
    @pytest.mark.parametrize("version", [1, 2])
    def test_header_that_fits(self, version: int) -> None:
        check_header({"format": "f", "version": version}, "f", 2, "x")

    @pytest.mark.parametrize(
        ("payload", "message"),
        [
            pytest.param({}, "x has format None, expected 'f'", id="nothing"),
            pytest.param({"format": "g", "version": 1}, "x has format 'g', expected 'f'", id="format"),
            pytest.param({"format": "f"}, "x has version None, expected an integer up to 2", id="no-version"),
            pytest.param({"format": "f", "version": "1"}, "x has version '1'", id="text"),
            pytest.param({"format": "f", "version": 0}, "x has version 0", id="zero"),
            pytest.param({"format": "f", "version": 3}, "reads up to 2; upgrade teal-llm", id="newer"),
        ],
    )
    def test_bad_header(self, payload: dict[str, Any], message: str) -> None:
        with pytest.raises(TealError, match=message):
            check_header(payload, "f", 2, "x")

    def test_keys(self) -> None:
        check_keys({"a": 1}, ("a", "b"), "x", ("a",))
        with pytest.raises(TealError, match=r"x has unknown keys \['c'\]"):
            check_keys({"a": 1, "c": 1}, ("a", "b"), "x")
        with pytest.raises(TealError, match=r"x lacks \['b'\]"):
            check_keys({"a": 1}, ("a", "b"), "x", ("a", "b"))


class TestCache:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TEAL_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_makes_once(self, folder: Path) -> None:
        assert cached("kind", "a", lambda: b"one") == b"one"
        assert cached("kind", "a", lambda: b"two") == b"one"
        assert cached("kind", "b", lambda: b"two") == b"two"
        assert cached("other", "a", lambda: b"three") == b"three"
        assert sorted(path.suffix for path in folder.iterdir()) == [".kind", ".kind", ".other"]

    def test_what_is_not_valid_is_made_anew(self, folder: Path) -> None:
        cached("kind", "a", lambda: b"one")
        assert cached("kind", "a", lambda: b"two", lambda content: content != b"one") == b"two"
        (path,) = folder.iterdir()
        assert path.read_bytes() == b"two"
        path.write_bytes(b"")
        assert cached("kind", "a", lambda: b"three") == b"three"

    def test_the_first_of_two_processes_decides(self, folder: Path) -> None:
        def make() -> bytes:
            cached("kind", "a", lambda: b"another's")
            return b"own"

        assert cached("kind", "a", make) == b"another's"
        assert [path.read_bytes() for path in folder.iterdir()] == [b"another's"]

    def test_what_cannot_be_kept_is_made(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.write_text("a file")
        assert cached("kind", "a", lambda: b"one") == b"one"
        monkeypatch.setenv("TEAL_CACHE", "")
        monkeypatch.setattr(Path, "home", raising_no_home)
        assert cached("kind", "a", lambda: b"two") == b"two"
        monkeypatch.setenv("TEAL_CACHE", str(folder.parent))
        folder.unlink()
        cached("kind", "a", lambda: b"")
        (path,) = folder.parent.glob("*.kind")
        path.unlink()
        path.mkdir()
        assert cached("kind", "a", lambda: b"three") == b"three", "a folder in the file's place"

    def test_is_in_the_home_without_a_setting(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TEAL_CACHE")
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
        cached("kind", "a", lambda: b"one")
        assert [path.read_bytes() for path in (tmp_path / "home" / ".cache" / "teal").iterdir()] == [b"one"]


def raising_no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")
