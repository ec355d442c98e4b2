"""Where a run lies: in a folder or, where `runs` is a URI, in a store with a mirror on each node.

Stages work in local folders. For a run in an object store these are its mirror, a folder in the
node's cache which is named by the percent-encoded URI: so whoever is handed a path of it, on
whichever node, can tell what it stands for in the store. For every other path the functions here
do nothing, or what pathlib does.

Nothing is changed in place in a store. A file is there whole or not at all, since a PUT is atomic;
a folder is committed by one file that is put last. So what a mirror has of a file needs no second
look, and mirrors can be deleted whenever no job is at work.

Object stores have no locks and no renaming. Two jobs of one node keep out of each other's way by
the locks of the mirror, and `ray job submit` runs all jobs on the head node. Two jobs that make the
same thing on nodes which share nothing do the work twice, and one may take from the other what is
unfinished, so that it fails and has to be run again. What is committed is whole even then: the
same settings and inputs made it, and whichever is there first stays.

Endpoint and credentials come from the environment alone, on every node: AWS_ENDPOINT_URL,
AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what else the AWS SDK looks for), and
for other stores what pyarrow.fs reads.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from llkd_ray.errors import StorageError

_MIRRORS = "stores"
# The name of a folder may have 255 bytes.
_MAX_NAME = 240
# Of a request that a store refuses (503 SlowDown, a connection that fails). Waits are random and
# grow to 20 s: a store may be away for half a minute; one that is gone is told after one or two.
_ATTEMPTS = 10
# Without these, a store that is silent for 3 s is given up.
_CONNECT_S = 10.0
_SILENCE_S = 60.0
_THREADS = 8
_PIECE_BYTES = 32 << 20


@dataclass(frozen=True)
class _Place:
    """What a path of a mirror stands for."""

    filesystem: Any
    path: str
    """In the file system."""
    uri: str


@dataclass(frozen=True)
class Stored:
    """A file of a store."""

    name: str
    """Path within the folder that was asked about."""
    size_bytes: int
    written: float
    """Seconds since 1970."""


def folder_of(runs: str, cache: str) -> Path:
    """Return the folder of all runs, or this node's mirror of it.

    Args:
        runs: The experiment's setting: a folder or a URI.
        cache: Folder for mirrors.

    Raises:
        StorageError: The URI is too long to name a folder.
    """
    if "://" not in runs:
        return Path(runs).expanduser()
    if runs.startswith("file://"):
        return Path(unquote(urlsplit(runs).path))
    name = quote(runs.rstrip("/"), safe="")
    if len(name) > _MAX_NAME:
        raise StorageError(f"runs = {runs!r}: this URI is too long, choose a shorter one")
    return Path(cache).expanduser().absolute() / _MIRRORS / name


def in_store(path: Path) -> bool:
    """Return whether a path is one of a mirror."""
    return _uri_of(path) is not None


def address(path: Path) -> str:
    """Return what people call a path: the URI that it stands for."""
    found = _uri_of(path)
    return str(path) if found is None else "/".join([found[0], *found[1]])


def entry_of(path: Path) -> Path:
    """Return the folder or file in a run's folder that a path of a mirror is, or is within."""
    found = _uri_of(path)
    assert found is not None
    # The run's name and that of the entry come first.
    above = len(found[1]) - 2
    return path.parents[above - 1] if above > 0 else path


def filesystem_of(path: Path) -> tuple[Any, str]:
    """Return the pyarrow file system and the path in it; no file system for a local path."""
    place = _place(path)
    return (None, str(path.resolve())) if place is None else (place.filesystem, place.path)


def check(folder: Path) -> None:
    """Write a few bytes into the store, so that one which cannot be used is told at once.

    Raises:
        StorageError: It cannot be written.
    """
    place = _place(folder)
    if place is not None:
        with _told(place), place.filesystem.open_output_stream(f"{place.path}/.writable") as stream:
            stream.write(b"by llkd_ray\n")


def exists(path: Path) -> bool:
    """Return whether there is such a file; in a store, whatever its mirror says."""
    place = _place(path)
    if place is None:
        return path.is_file()
    with _told(place):
        return bool(place.filesystem.get_file_info(place.path).is_file)


def read(path: Path) -> bytes:
    """Return the content of a small file; from the store, whatever its mirror says.

    Raises:
        FileNotFoundError: There is none.
    """
    place = _place(path)
    if place is None:
        return path.read_bytes()
    with _told(place), place.filesystem.open_input_stream(place.path) as stream:
        return bytes(stream.read())


def names(folder: Path) -> list[str]:
    """List what is in a folder; nothing where there is none."""
    place = _place(folder)
    if place is None:
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(folder)  # noqa: PTH208 - names, not paths, and many of them.
        return []
    with _told(place):
        found = place.filesystem.get_file_info(_within(place.path, recursive=False))
    return [info.base_name for info in found]


def files(folder: Path) -> list[Stored]:
    """List the files in a store's folder and in those within it; none for a local folder."""
    place = _place(folder)
    return [] if place is None else list(_files(place))


def here(path: Path) -> Path:
    """Return a path after what it stands for has been brought to this node.

    Of a folder, the files are fetched that are in the store and not here yet, by one process at a
    time.

    Raises:
        FileNotFoundError: The store lost a file after it was listed.
    """
    place = _place(path)
    if place is None or path.is_file():
        return path
    entry = entry_of(path)
    entry.parent.mkdir(parents=True, exist_ok=True)
    with open(entry.with_name(f".{entry.name}.fetching"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _told(place):
            if place.filesystem.get_file_info(place.path).is_file:
                _download(place.filesystem, place.path, path)
                return path
            missing = [file.name for file in _files(place) if not (path / file.name).is_file()]
            _at_once(
                lambda name: _download(place.filesystem, f"{place.path}/{name}", path / name),
                missing,
            )
    return path


def fetch(paths: Iterable[Path]) -> None:
    """Bring files to this node, many at once.

    Raises:
        FileNotFoundError: One is not in the store.
    """

    def bring(path: Path) -> None:
        place = _place(path)
        assert place is not None
        with _told(place):
            _download(place.filesystem, place.path, path)

    _at_once(bring, [path for path in paths if in_store(path) and not path.is_file()])


def put(path: Path) -> None:
    """Put a file of a mirror, or all files of a folder, into the store."""
    place = _place(path)
    if place is not None:
        _upload(path, [path] if path.is_file() else _local_files(path), place)


def commit(folder: Path, to: Path, last: str) -> None:
    """Put a folder's files into another place of the store, and the one that says so last.

    What a try before this one left there is overwritten or removed. Until `last` is there, a reader
    takes nothing for whole; where it is there, somebody was first, and this does nothing.

    Args:
        folder: Of a mirror, finished.
        to: What it is to be called in the store.
        last: Name of the file that makes it whole.
    """
    place = _place(to)
    assert place is not None
    paths = [path for path in _local_files(folder) if path != folder / last]
    with _told(place):
        # Asked for before the first PUT: of two that are at it, the second to end must not remove
        # what the first has made whole.
        found = {file.name for file in _files(place)}
        if last in found:
            return
        for name in found - {path.relative_to(folder).as_posix() for path in paths}:
            with contextlib.suppress(FileNotFoundError):
                place.filesystem.delete_file(f"{place.path}/{name}")
    _upload(folder, paths, place)
    _upload(folder, [folder / last], place)


def remove(path: Path) -> None:
    """Delete a file or folder, and what it stands for in a store."""
    place = _place(path)
    if place is not None:
        with _told(place), contextlib.suppress(FileNotFoundError):
            info = place.filesystem.get_file_info(place.path)
            if info.is_file:
                place.filesystem.delete_file(place.path)
            elif _is_there(info):
                place.filesystem.delete_dir(place.path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _uri_of(path: Path) -> tuple[str, tuple[str, ...]] | None:
    """Return the URI that a path's mirror is named by, and the parts of the path within it."""
    parts = path.parts
    for at in range(1, len(parts)):
        if parts[at - 1] == _MIRRORS and "%3A%2F%2F" in parts[at]:
            return unquote(parts[at]), parts[at + 1 :]
    return None


def _place(path: Path) -> _Place | None:
    found = _uri_of(path)
    if found is None:
        return None
    uri, within = found
    filesystem, root = _open(uri)
    return _Place(filesystem, "/".join([root, *within]), uri)


@functools.cache
def _open(uri: str) -> tuple[Any, str]:
    """Open the file system of a URI, once in a process."""
    # A typo in the experiment is told before this is imported.
    import pyarrow as pa
    from pyarrow import fs

    if not uri.startswith("s3://"):
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, ValueError) as error:
            raise StorageError(
                f"runs = {uri!r}: {_first_line(error)}; set it to a folder, s3://BUCKET/PATH, or "
                "another URI that pyarrow.fs opens (gs://, abfss://, fsspec+SCHEME://)"
            ) from None
        return filesystem, str(path).rstrip("/")
    # pyarrow takes this variable where it makes a file system from a URI, and there offers no
    # retries to be set.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        # Without a region the SDK would ask the machine's cloud for one, even if it is in none.
        options = {"scheme": scheme or "https", "endpoint_override": host.rstrip("/")}
        region = region or "us-east-1"
    elif region is None:
        try:
            region = fs.FileSystem.from_uri(uri)[0].region
        except OSError as error:
            raise _refused(uri, error) from error

    class Patient(fs.S3FileSystem):  # type: ignore[misc]
        """Stays patient in other processes, where pyarrow's own would forget the retries."""

        def __reduce__(self) -> tuple[Any, ...]:
            return _reopen, (uri,)

    filesystem = Patient(
        region=region,
        connect_timeout=_CONNECT_S,
        request_timeout=_SILENCE_S,
        # A small file is then one request.
        allow_delayed_open=True,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        **options,
    )
    return filesystem, uri.removeprefix("s3://")


def _reopen(uri: str) -> Any:
    return _open(uri)[0]


@contextlib.contextmanager
def _told(place: _Place) -> Iterator[None]:
    """Say what a store refused as something that people can mend."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _refused(place.uri, error) from error


def _refused(uri: str, error: OSError) -> StorageError:
    return StorageError(
        f"{uri}: {_first_line(error)}; see that the bucket is there and that AWS_ENDPOINT_URL, "
        "AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set on every node"
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _within(path: str, *, recursive: bool) -> Any:
    from pyarrow import fs

    return fs.FileSelector(path, recursive=recursive, allow_not_found=True)


def _is_there(info: Any) -> bool:
    from pyarrow import fs

    return bool(info.type != fs.FileType.NotFound)


def _files(place: _Place) -> Iterator[Stored]:
    for info in place.filesystem.get_file_info(_within(place.path, recursive=True)):
        if info.is_file:
            name = str(PurePosixPath(info.path).relative_to(place.path))
            yield Stored(name, info.size, (info.mtime_ns or 0) / 1e9)


def _local_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _at_once(act: Callable[[Any], None], items: list[Any]) -> None:
    with ThreadPoolExecutor(min(_THREADS, len(items) or 1)) as pool:
        for _ in pool.map(act, items):
            pass


def _upload(root: Path, paths: list[Path], place: _Place) -> None:
    """Put files in the place of `root`, to which they are, or within which they stand."""

    def upload(path: Path) -> None:
        target = "/".join([place.path, *path.relative_to(root).parts])
        if not place.uri.startswith("s3://"):
            place.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
        with path.open("rb") as source, place.filesystem.open_output_stream(target) as stream:
            while piece := source.read(_PIECE_BYTES):
                stream.write(piece)

    with _told(place):
        _at_once(upload, paths)


def _download(filesystem: Any, source: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with filesystem.open_input_stream(source) as stream, beside.open("wb") as file:
        while piece := stream.read(_PIECE_BYTES):
            file.write(piece)
    os.replace(beside, path)
