"""A student before training: the embedded encoder with a fresh head, as a plain folder."""

import socket
from pathlib import Path

from llkd_ray.config import EncoderStudent
from llkd_ray.embedded import CORPORA, locate
from llkd_ray.student.model import load_tokenizer, load_untrained
from llkd_ray.student.model import locate as locate_encoder

LABELS = ("abbreviation", "description", "thing", "person", "place", "number")


def untrained_student(folder: Path) -> Path:
    section = EncoderStudent()
    model = load_untrained(section, LABELS, seed=0)
    # A head drawn this small answers about 1/6 everywhere; a larger one tells texts apart.
    model.classifier.weight.data *= 20
    model.save_pretrained(folder)
    load_tokenizer(locate_encoder(section.model)).save_pretrained(folder)
    return folder


def questions(count: int) -> list[str]:
    """Distinct real texts."""
    lines = locate(CORPORA["trec"]).read_text(encoding="latin-1").splitlines()
    return list(dict.fromkeys(line.partition(" ")[2] for line in lines if " " in line))[:count]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
