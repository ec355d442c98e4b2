"""When the teacher answers in the student's place."""

from pydantic import NonNegativeFloat, PositiveInt
from pydantic import model_validator as validator

from llkd_ray.config.section import Fraction, OpenFraction, Section


class CascadeSection(Section):
    """The student answers; where its confidence is below a threshold, the teacher does.

    The threshold comes from what both answer to the validation rows, which the teacher must have
    labelled (`teacher.splits`), and from one target; without any, the cascade answers as many
    texts rightly as it can. A teacher that is not measurably better there is asked about nothing.
    """

    accuracy: OpenFraction | None = None
    """Target: be right at least this often, of the texts that get an answer, and send as few as
    possible to the teacher."""
    max_teacher_fraction: Fraction | None = None
    """Target: send at most this share of the texts to the teacher, and answer as many texts rightly
    as possible."""
    abstain_below: Fraction = 0.0
    """An answer of less confidence than this, whoever gives it, is withheld: the label is null. The
    student's stands where it alone is sure enough."""
    teacher_replicas: PositiveInt = 1
    teacher_cpus_per_replica: NonNegativeFloat = 0.0
    """CPUs reserved for a replica of the teacher beside those of the student,
    `serve.cpus_per_replica`. 0 lets both take turns on these: the student has no work of a request
    while its teacher has."""
    teacher_gpus_per_replica: NonNegativeFloat = 0.0
    teacher_max_ongoing_requests: PositiveInt = 128
    """Calls, each with the unsure texts of one request, that one replica of the teacher holds at
    once; vLLM batches them."""
    teacher_max_queued_requests: PositiveInt = 128
    """Calls that wait for it at most; past them requests are refused, to be tried again."""

    @validator(mode="after")
    def _has_one_target(self) -> "CascadeSection":
        if self.accuracy is not None and self.max_teacher_fraction is not None:
            raise ValueError(
                "accuracy and max_teacher_fraction are two targets: set one, and read from the "
                "report's curve what it means for the other"
            )
        return self
