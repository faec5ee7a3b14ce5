"""What a crash leaves of a directory: every system call of a real job that changes it, replayed up to any point.

`record` runs a program under strace; `Disk` replays the calls and knows, of each file and each directory, what is only
in the kernel's memory and what fsync has made durable. A process's death leaves the first, a power cut the second.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "openat,open,creat,write,pwrite64,writev,pwritev,ftruncate,truncate,fallocate,fsync,fdatasync,sync_file_range,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,copy_file_range,sendfile"
)
UNKNOWN = {"pwritev", "fallocate", "truncate", "copy_file_range", "sendfile", "symlink", "symlinkat"}
LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
FD = re.compile(r"^(?:AT_FDCWD|-?\d+)<([^>]*)>$")


@dataclass(frozen=True)
class Effect:
    """One call below the root that succeeded; or a line that the job said (`call` is `said`, `data` its text)."""

    call: str
    path: str = ""
    other: str = ""
    data: bytes = b""
    offset: int = -1
    flags: str = ""


def unescape(text: str) -> str:
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), text)


def record(program: Path, root: Path, log: Path, deadline_s: float) -> list[Effect]:
    """Run `python PROGRAM ROOT` and return what it did below ROOT and said on standard output, in order."""
    traced = ["strace", "-f", "-y", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-o", str(log)]
    done = subprocess.run(
        [*traced, sys.executable, str(program), str(root)],
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(parse(log.read_text().splitlines(), str(root)))


def parse(lines: list[str], root: str) -> list[Effect]:
    unfinished: dict[str, str] = {}
    effects = []
    for line in lines:
        pid = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            unfinished[pid] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"^\d+ +<\.\.\. \w+ resumed>(.*)$", line):
            line = unfinished.pop(pid) + resumed[1]
        found = LINE.match(line)
        if found and int(found[4]) >= 0 and (effect := _effect(found[2], found[3], int(found[4]), root)):
            effects.append(effect)
    return effects


def _effect(call: str, text: str, result: int, root: str) -> Effect | None:
    items = re.split(r", (?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", text)
    arguments = [_argument(item) for item in items]
    if call.endswith("at") or call == "renameat2":  # names are in the directory whose descriptor comes before
        named = [number for number, item in enumerate(items) if item.startswith('"')]
        for number in named:
            arguments[number] = os.path.join(arguments[number - 1], arguments[number])
        arguments = [item for number, item in enumerate(arguments) if number + 1 not in named]
    first = arguments[0]
    if call == "write" and first == "<stdout>":
        return Effect("said", data=arguments[1].encode("latin-1"))
    paths = [item for item in arguments if item.startswith(root)]
    if not paths:
        return None
    if call == "sendfile" and not first.startswith(root):  # what is read goes to a socket
        return None
    assert call not in UNKNOWN, f"{call} below the root: teach Disk about it"
    match call:
        case "write" | "pwrite64":
            offset = int(arguments[3]) if call == "pwrite64" else -1
            return Effect("write", first, data=arguments[1].encode("latin-1")[:result], offset=offset)
        case "writev":
            data = "".join(unescape(found) for found in re.findall(r'iov_base="([^"]*)"', text))
            return Effect("write", first, data=data.encode("latin-1")[:result])
        case "openat" | "open" | "creat":
            flags = next((item for item in arguments if item.startswith("O_")), "O_CREAT|O_TRUNC")
            return Effect("open", paths[0], flags=flags) if "O_CREAT" in flags or "O_TRUNC" in flags else None
        case "sync_file_range":  # begins writing back; makes nothing durable
            return None
        case "fsync" | "fdatasync":
            return Effect("sync", first)
        case "rename" | "renameat" | "renameat2":
            return Effect("rename", paths[0], paths[1])
        case "link" | "linkat":
            return Effect("link", paths[0], paths[1])
        case "unlink" | "unlinkat":
            return Effect("rmdir" if "AT_REMOVEDIR" in arguments else "unlink", paths[0])
        case "mkdir" | "mkdirat":
            return Effect("mkdir", paths[0])
        case "ftruncate":
            return Effect("truncate", first, offset=int(arguments[1]))
    return Effect(call, paths[0])


def _argument(text: str) -> str:
    if text.startswith('"'):
        return unescape(text.strip('"'))
    if found := FD.match(text):
        path = unescape(found[1])
        return "<stdout>" if text.startswith("1<") else path
    return text


@dataclass
class File:
    data: bytearray = field(default_factory=bytearray)
    durable: bytes | None = None  # None: never synced


@dataclass
class Directory:
    entries: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)


class Disk:
    """A directory tree as replayed so far. The root itself is durable."""

    def __init__(self, root: str) -> None:
        self._root, self.top = root, Directory()

    def _find(self, path: str) -> tuple[Directory, str]:
        node = self.top
        *above, name = Path(path).relative_to(self._root).parts or ("",)
        for part in above:
            child = node.entries[part]
            assert isinstance(child, Directory)
            node = child
        return node, name

    def apply(self, effect: Effect) -> None:
        if effect.call == "said" or effect.path.endswith("(deleted)"):
            return
        if effect.path == self._root:
            if effect.call == "sync":
                self.top.durable = dict(self.top.entries)
            return
        parent, name = self._find(effect.path)
        node = parent.entries.get(name)
        match effect.call:
            case "open":
                if node is None:
                    parent.entries[name] = File()
                elif "O_TRUNC" in effect.flags and isinstance(node, File):
                    node.data.clear()
            case "write":
                assert isinstance(node, File), effect
                at = len(node.data) if effect.offset < 0 else effect.offset
                node.data[at : at + len(effect.data)] = effect.data
            case "truncate":
                assert isinstance(node, File), effect
                node.data[effect.offset :] = b"\0" * max(0, effect.offset - len(node.data))
            case "sync":
                if isinstance(node, File):
                    node.durable = bytes(node.data)
                elif node is not None:
                    node.durable = dict(node.entries)
            case "mkdir":
                parent.entries[name] = Directory()
            case "rmdir" | "unlink":
                del parent.entries[name]
            case "rename" | "link":
                assert node is not None, effect
                target, new = self._find(effect.other)
                target.entries[new] = node
                if effect.call == "rename":
                    del parent.entries[name]
            case unknown:
                raise AssertionError(f"{unknown}: teach Disk about it")

    def image(self, *, power_cut: bool) -> dict[str, bytes | None]:
        """Path below the root -> contents, None for a directory: all that was done, or what had become durable."""
        image: dict[str, bytes | None] = {}

        def walk(node: Directory, prefix: str) -> None:
            for name, child in (node.durable if power_cut else node.entries).items():
                if isinstance(child, Directory):
                    image[prefix + name] = None
                    walk(child, f"{prefix}{name}/")
                else:
                    image[prefix + name] = (child.durable or b"") if power_cut else bytes(child.data)

        walk(self.top, "")
        return image


def lay_out(image: dict[str, bytes | None], root: Path) -> None:
    root.mkdir(parents=True)
    for name, data in image.items():
        if data is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
