"""How good are the embedded teachers' labels, and what does each calibration make of them?

Each DATA is a folder with train.parquet and test.parquet, columns `text` and `label`; its name
chooses the experiment, jobs/configs/NAME.toml. Test rows are labelled as a user would label a
corpus, by jobs/prepare.py and jobs/label.py; where an experiment takes examples for its prompt from
gold rows, these are of train.parquet. A fifth as many further test rows fit temperature, vector and
stacked and are not scored. The gold of the scored rows is seen by the score alone. Every figure is
one that the labels artifact holds.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import figures
import pyarrow.parquet as pq

from llkd_ray import embedded
from llkd_ray.config import load_experiment
from llkd_ray.errors import CorpusError, LLKDError
from llkd_ray.lineage import Lineage

JOBS = Path(__file__).parents[1]
CALIBRATIONS = {
    "raw": "none",
    "contextual": "contextual",
    "batch": "batch",
    "temperature": "temperature",
    "vector": "vector",
    "stacked": "stacked",
}
FIGURES = ("accuracy", "macro_f1", "ece", "accuracy_confident_half")


def measure(folders: list[Path], teachers: list[str], rows: int, runs: Path) -> dict[str, Any]:
    """Label rows of every folder by every teacher and return the figures.

    Args:
        folders: Of the data sets.
        teachers: Embedded models by name.
        rows: To score, of each data set; all there are where there are fewer.
        runs: Folder of the runs; what is there already is not done again.

    Raises:
        LLKDError: A data set has no experiment or no file, or a job has failed.
    """
    started = time.perf_counter()
    experiments = {folder: experiment_of(folder) for folder in folders}
    quality = {
        folder.name: {
            teacher: labelled(folder, experiment, teacher, rows, runs) for teacher in teachers
        }
        for folder, experiment in experiments.items()
    }
    lines = [
        [data, teacher, calibration, of_rows["rows"], *(of_rows[name] for name in FIGURES)]
        for data, of_data in quality.items()
        for teacher, of_teacher in of_data.items()
        for calibration, of_rows in of_teacher.items()
    ]
    header = ["data", "teacher", "calibration", "rows", "accuracy", "macro-F1", "ECE", "surer half"]
    print(figures.table(header, lines))
    scored = sum(
        of_teacher["raw"]["rows"] for of_data in quality.values() for of_teacher in of_data.values()
    )
    return {**quality, "rows": scored, "seconds": round(time.perf_counter() - started, 1)}


def experiment_of(folder: Path) -> Path:
    """Return the experiment of a data set.

    Raises:
        CorpusError: There is none of its name, or a file of the data is missing.
    """
    experiment = JOBS / f"configs/{folder.name}.toml"
    if not experiment.is_file():
        raise CorpusError(
            f"{folder}: there is no {experiment.name} in jobs/configs; name the folder after one"
        )
    for split in ("train", "test"):
        if not (folder / f"{split}.parquet").is_file():
            raise CorpusError(f"{folder}: there is no {split}.parquet; put gold rows there")
    return experiment


def labelled(
    folder: Path, experiment: Path, teacher: str, rows: int, runs: Path
) -> dict[str, dict[str, float]]:
    """Label test rows and return the figures of each calibration.

    Raises:
        LLKDError: A job has failed; it has said why.
    """
    there = pq.read_metadata(folder / "test.parquet").num_rows
    overrides = [
        f"runs={runs}",
        f"name={folder.name}-{teacher}",
        f"corpus.source={folder / 'test.parquet'}",
        f"corpus.validation_fraction={min(rows / 5 / there, 0.2)}",
        "corpus.test_fraction=0.0",
        f"teacher.model={teacher}",
        'teacher.splits=["unlabeled", "validation"]',
        f"teacher.max_unlabeled_rows={rows}",
        "calibration.kind=stacked",
    ]
    if load_experiment(experiment).task.examples_source is not None:
        overrides.append(f"task.examples_source={folder / 'train.parquet'}")
    for job in ("prepare", "label"):
        command = [sys.executable, str(JOBS / f"{job}.py"), str(experiment), *overrides]
        if subprocess.run(command, check=False).returncode:
            raise LLKDError(f"jobs/{job}.py has failed for {folder} and {teacher}")
    quality = Lineage(load_experiment(experiment, overrides)).labels.manifest().details["quality"]
    return {
        name: {
            "rows": quality[kind]["unlabeled"]["rows"],
            **{figure: round(quality[kind]["unlabeled"][figure], 4) for figure in FIGURES},
        }
        for name, kind in CALIBRATIONS.items()
    }


def main() -> int:
    parser = figures.parser_of(
        __doc__, "100 rows of the first two data sets by one teacher, within four minutes"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="folder of a data set")
    parser.add_argument("--rows", type=int, default=500, help="rows to score, of each data set")
    parser.add_argument(
        "--teachers", nargs="+", choices=list(embedded.TEACHERS), default=list(embedded.TEACHERS)
    )
    parser.add_argument("--runs", type=Path, help="keep the runs here, and go on with those there")
    arguments = parser.parse_args()
    folders = [folder.resolve() for folder in arguments.data]
    teachers, rows = arguments.teachers, arguments.rows
    if arguments.quick:
        folders, teachers, rows = folders[:2], teachers[:1], 100
    with tempfile.TemporaryDirectory() as temporary:
        runs = (arguments.runs or Path(temporary)).resolve()
        return figures.run(lambda: measure(folders, teachers, rows, runs))


if __name__ == "__main__":
    sys.exit(main())
