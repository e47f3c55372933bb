"""What the lab guest boots from, and what it says when it can't."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import run
from offload.errors import UnavailableError
from offload.testing.lab import initramfs
from offload.testing.lab.channel import GuestError
from offload.testing.lab.guest import Guest

ROOT = Path(__file__).resolve().parents[2]


def kernels(folder: Path, *versions: str, targets: bool = True) -> None:
    for version in versions:
        (folder / f"vmlinuz-{version}").touch()
        drivers = folder / version / "kernel/drivers"
        (drivers / ("target" if targets else "net")).mkdir(parents=True)


def test_find_kernel_takes_the_newest_by_number(tmp_path: Path) -> None:
    kernels(tmp_path, "6.1.0-9-amd64", "6.1.0-56-amd64", "5.10.0-99-amd64")
    assert initramfs.find_kernel(tmp_path, tmp_path).name == "vmlinuz-6.1.0-56-amd64"


def test_find_kernel_leaves_out_one_without_targets(tmp_path: Path) -> None:
    kernels(tmp_path, "6.1.0-56-cloud-amd64", targets=False)
    kernels(tmp_path, "6.1.0-9-amd64")
    (tmp_path / "vmlinuz-7.0.0-amd64").touch()  # its modules are not here
    assert initramfs.find_kernel(tmp_path, tmp_path).name == "vmlinuz-6.1.0-9-amd64"


def test_find_kernel_none_is_an_error_that_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        initramfs.find_kernel(tmp_path, tmp_path)
    assert "apt-get install linux-image-amd64" in caught.value.hint


def test_hidden_folders_are_those_under_run_and_tmp_also_through_links(tmp_path: Path) -> None:
    made = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        link = made / "link"
        link.symlink_to("/tmp")
        assert initramfs.hidden_folders([Path("/usr"), Path("/run/lock"), link]) == [
            Path("/run/lock"),
            Path("/tmp"),
        ]
        assert initramfs.hidden_folders([made, Path("/tmpfoo")]) == []
    finally:
        shutil.rmtree(made)


@pytest.mark.parametrize(
    ("program", "package"),
    [("qemu-system-x86_64", "qemu-system-x86"), ("busybox", "busybox-static")],
)
def test_boot_missing_program_is_an_error_that_names_the_package(
    program: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in {"qemu-system-x86_64", "busybox", "modprobe", "setpriv"} - {program}:
        (programs / name).symlink_to(run.require_program(name, "?"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(run, "_DEFAULT_PATH", str(programs))
    with pytest.raises(UnavailableError, match=program) as caught:
        Guest(tmp_path)
    assert caught.value.hint == f"install it: apt-get install {package}"


def test_boot_failure_shows_the_end_of_the_console(tmp_path: Path) -> None:
    missing = Path("/run/offload-lab-no-such-folder")
    with pytest.raises(GuestError, match="did not boot: it ended") as caught:
        Guest(tmp_path, visible=[missing])
    assert "offload-lab-no-such-folder failed: No such file" in str(caught.value)
    assert "Kernel panic" in (tmp_path / "console.log").read_text()


def test_boot_qemu_that_refuses_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"(?s)QEMU does not run: .*Invalid SMP CPUs 4096"):
        Guest(tmp_path, cpus=4096)


@pytest.fixture
def checkout() -> Iterator[Path]:
    """This package and a Python environment, copied to where the guest has its own file system."""
    made = Path(tempfile.mkdtemp(prefix="offload-lab-", dir="/tmp"))
    shutil.copytree(ROOT / "offload", made / "offload")
    run.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(made / ".venv")])
    yield made
    shutil.rmtree(made)


_BOOT = """
import sys
from pathlib import Path
from offload.testing.lab.guest import Guest
with Guest(Path(sys.argv[1])) as guest:
    script = "import offload, sys; print(offload.__file__, sys.prefix)"
    print(guest.run([sys.executable, "-c", script], cwd=str(Path.cwd())).text, end="")
    print(guest.shell("touch offload/new; ls -d /tmp/*", cwd=str(Path.cwd())).text, end="")
"""


def test_boot_checkout_in_a_temporary_folder_is_seen_and_no_other(
    checkout: Path, tmp_path: Path
) -> None:
    argv = [str(checkout / ".venv/bin/python"), "-c", _BOOT, str(tmp_path)]
    said = run.run(argv, cwd=checkout, timeout_s=280).stdout.splitlines()
    assert said == [f"{checkout}/offload/__init__.py {checkout}/.venv", str(checkout)]
    assert not (checkout / "offload/new").exists()
