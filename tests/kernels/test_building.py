"""Building the C kernel: whose folder it is kept in, and what happens where that does not work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyprec.kernels import building
from anyprec.kernels.building import BuildError, find_compiler, load, private_folder
from anyprec.kernels.choosing import _Machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C kernel is tried on Linux")

try:
    COMPILER = find_compiler()[0]
except BuildError:
    pytest.skip("no C compiler", allow_module_level=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this user."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "anyprec" / "kernels"


@pytest.fixture
def compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of the C compiler, to be written."""
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setattr(building, "find_compiler", lambda: [str(folder / "cc")])
    return folder / "cc"


def write_program(file: Path, text: str) -> None:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o700)


def test_the_library_is_kept_in_a_folder_that_is_closed_to_others(cache: Path) -> None:
    _, reason = load()
    assert str(cache) in reason
    assert cache.stat().st_mode & 0o777 == 0o700
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o077 == 0


def test_it_is_built_once(cache: Path, compiler: Path) -> None:
    write_program(compiler, f'exec {COMPILER} "$@"')
    load()
    (file,) = cache.iterdir()
    before = file.stat().st_mtime_ns
    write_program(compiler, "exit 1")
    load()
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("what", ["source", "processor", "options"])
def test_another_source_processor_or_option_is_another_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    load()
    if what == "source":
        changed = tmp_path / "changed.c"
        changed.write_bytes(building._SOURCE.read_bytes() + b"/* another version */\n")
        monkeypatch.setattr(building, "_SOURCE", changed)
    elif what == "processor":
        monkeypatch.setattr(building, "_processor", lambda: "another one")
    else:
        monkeypatch.setattr(building, "_OPTIONS", (*building._OPTIONS, "-DANOTHER"))
    load()
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o750, 0o705])
def test_a_folder_that_others_can_use_is_not_used(cache: Path, mode: int) -> None:
    cache.mkdir(parents=True)
    cache.chmod(mode)
    assert private_folder(cache) is None
    _, reason = load()
    assert "this process alone" in reason
    assert not list(cache.iterdir())


def test_a_folder_on_the_way_that_everybody_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "open" / "kernels"
    folder.mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    assert private_folder(folder) == folder
    folder.parent.chmod(0o777)
    assert private_folder(folder) is None
    folder.parent.chmod(0o1777)  # as /tmp is: only the owner may rename
    assert private_folder(folder) == folder


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    assert private_folder(link) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    assert private_folder(folder) is None


def test_a_library_that_others_could_have_written_is_built_again(cache: Path) -> None:
    load()
    (file,) = cache.iterdir()
    file.write_bytes(b"not a library")
    file.chmod(0o777)
    load()
    assert file.stat().st_mode & 0o077 == 0
    assert file.read_bytes()[:4] == b"\x7fELF"


def test_a_cache_that_cannot_be_written_to_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _, reason = load()
    assert "this process alone" in reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo no such option >&2; exit 1", "no such option"),
        ("kill -SEGV $$", "failed"),
        ("exit 0", "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_leaves_torchs_operations_and_a_reason(
    cache: Path, compiler: Path, text: str, message: str
) -> None:
    write_program(compiler, text)
    with pytest.raises(BuildError, match=message):
        load()
    machine = _Machine()
    assert machine.kernel("cpu") is None
    assert message in machine.reasons["cpu"]
    assert not any(file.name.startswith("building-") for file in cache.iterdir())


def test_a_compiler_that_hangs_is_given_up(
    cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "_LONGEST_BUILD", 0.1)
    write_program(compiler, "exec sleep 60")
    with pytest.raises(BuildError, match="timed out"):
        load()


def test_without_a_compiler_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(building.sysconfig, "get_config_var", lambda _: "gcc -pthread")
    with pytest.raises(BuildError, match="no C compiler"):
        load()


def test_processes_that_build_at_once_do_not_disturb_each_other(cache: Path) -> None:
    # Without the rest of the package, which takes seconds to import.
    program = "import sys; sys.path.insert(0, sys.argv[1]); "
    program += "from building import load; load()[0].anyprec_tensor"
    command = [sys.executable, "-c", program, str(Path(building.__file__).parent)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


def test_a_machine_makes_its_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Machine()
    kernel = machine.kernel("cpu")
    monkeypatch.setattr(building, "_SOURCE", Path("/nowhere"))
    assert machine.kernel("cpu") is kernel
    assert machine.plain[torch._C._dispatch_keys(torch.empty(1)).raw_repr()] is kernel
