"""The image of the server, built from the Dockerfile by podman; needs Debian's packages `podman`,
`runc` and `mmdebstrap`, and root.

What stands in for what: a Debian of this machine's release, from where its apt gets packages, for
the base image of a registry; podman with runc on the network of the machine for a node's runtime.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/base:test"
CERTIFICATES = Path("/etc/ssl/certs")
LIMITS = ("--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")
"""podman's own are above what root may set where it lacks CAP_SYS_RESOURCE."""
WITHOUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*")
_TIMEOUT_S = 1200


@dataclass(frozen=True)
class Podman:
    """Images and containers of its own, in `folder`."""

    folder: Path

    @property
    def command(self) -> list[str]:
        places = [f"--{name}={self.folder / name}" for name in ("root", "runroot", "tmpdir")]
        return ["podman", *places, "--runtime=runc", "--cgroup-manager=cgroupfs",
                "--events-backend=none"]  # fmt: skip

    def run(self, *arguments: str, given: bytes | None = None) -> str:
        return run([*self.command, *arguments], given).decode()

    def program(self, target: str, *options: str) -> list[str]:
        """Starts a container as the pods of the manifests run it: user, capabilities, files."""
        return [
            *self.command, "run", "--rm", "--pull=never", "--network=host", *LIMITS,
            "--user=10001:10001", "--cap-drop=all", "--security-opt=no-new-privileges",
            "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:rw,mode=1777,size=256m",
            *options, image_of(target),
        ]  # fmt: skip

    def prepare(self) -> None:
        """Have the base, and show that a container of it runs. Raises AssertionError."""
        (self.folder / "pip.conf").write_text(pip_settings())
        self.run("import", "--quiet", "-", BASE, given=base(self.folder))
        self.run("run", "--rm", "--pull=never", "--network=host", *LIMITS, BASE, "true")

    def build(self, target: str, *options: str) -> None:
        """An image of the Dockerfile, as `image_of(target)`."""
        self.run(
            "build", "--pull=never", "--network=host", *LIMITS, f"--target={target}",
            f"--secret=id=pip,src={self.folder / 'pip.conf'}",
            f"--volume={CERTIFICATES}:{CERTIFICATES}:ro",
            f"--build-arg=BASE_IMAGE={BASE}", *options, f"--tag={image_of(target)}", str(ROOT),
        )  # fmt: skip

    def build_all(self, targets: Sequence[str]) -> None:
        """The first one alone, since the others share its first stages; then two at a time."""
        for one in targets[:1]:
            self.build(one)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.build, targets[1:]))


def image_of(target: str) -> str:
    return f"localhost/trimserve-{target}:test"


def run(command: Sequence[str], given: bytes | None = None) -> bytes:
    ended = subprocess.run(
        command, input=given, capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout[-2000:]!r} {ended.stderr[-4000:]!r}"
    return ended.stdout


def base(folder: Path) -> bytes:
    """A tar of a small Debian with Python, from the sources of this machine's apt."""
    form = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    asked = ["apt-get", "indextargets", "--format", form, "Identifier: Packages", "Origin: Debian"]
    sources = run(asked)
    assert sources, "apt has no sources: apt-get update"
    options = folder / "apt.conf"
    told = run(["apt-config", "dump", "Acquire"]).decode().splitlines()
    wanted = ("::Check-Valid-Until ", "::Check-Date ", "::http::Proxy ", "::https::Proxy ")
    options.write_text("\n".join(line for line in told if any(one in line for one in wanted)))
    codename = run(["sh", "-c", '. /etc/os-release; printf %s "$VERSION_CODENAME"']).decode()
    return run(
        [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=essential",
            "--include=python3,python3-venv,ca-certificates,libstdc++6", f"--aptopt={options}",
            *(f"--dpkgopt=path-exclude={one}" for one in WITHOUT),
            "--customize-hook=rm \"$1/etc/apt/sources.list\"", codename, "-",
        ],
        given=sources,
    )  # fmt: skip


def pip_settings() -> str:
    """Where this machine's pip gets packages, but for folders that a build can't see."""
    lines = [f"cert = {CERTIFICATES / 'ca-certificates.crt'}"]
    for line in run(["python3", "-m", "pip", "config", "list"]).decode().splitlines():
        name, _, value = line.partition("=")
        address = value.strip("'")
        if name.endswith((".index-url", ".extra-index-url")) and "file:" not in address:
            lines.append(f"{name.rpartition('.')[2]} = {address}")
    return "\n".join(["[global]", *lines, ""])


def torch_page() -> list[str]:
    """Options of a build by which torch without CUDA comes from where this machine's pip is told to
    find links, where that is a folder."""
    for line in run(["python3", "-m", "pip", "config", "list"]).decode().splitlines():
        name, _, value = line.partition("=")
        folder = Path(value.strip("'"))
        if name.endswith(".find-links") and folder.is_dir():
            return [f"--volume={folder}:{folder}:ro", f"--build-arg=TORCH_PAGE={folder}"]
    return []


@contextmanager
def built(*targets: str) -> Iterator[Podman]:
    """With the images of the Dockerfile's `targets`; all of it is gone afterwards."""
    _require()
    with tempfile.TemporaryDirectory(prefix="trimserve-image-") as name:
        podman = Podman(Path(name))
        try:
            try:
                podman.prepare()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"images can't be built: no container runs here: {error}")
            podman.build_all(targets)
            yield podman
        finally:
            subprocess.run(["umount", str(podman.folder / "root/overlay")],
                           capture_output=True, check=False)  # fmt: skip


def _require() -> None:
    missing = [one for one in ("podman", "runc", "mmdebstrap") if shutil.which(one) is None]
    if missing:
        message = f"{', '.join(missing)} missing: apt-get install podman runc mmdebstrap"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    asked = subprocess.run(["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs",
                            "none", "/mnt"], capture_output=True, check=False)  # fmt: skip
    if os.geteuid() != 0 or asked.returncode:
        pytest.skip("images can't be built: this user may not make namespaces and mount in them")
