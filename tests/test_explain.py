"""One row's story, as the job tells it."""

import pyarrow.parquet as pq
import pytest
from conftest import Run, run_job

from llkd_ray.errors import ArtifactError
from llkd_ray.report.story import as_text, tell


@pytest.mark.slow
def test_a_rows_story_is_told_epoch_by_epoch(small_run: Run) -> None:
    lineage = small_run.lineage
    [shard, *_] = sorted((lineage.labels.path / "unlabeled").glob("*.parquet"))
    row = pq.read_table(shard).to_pylist()[0]
    told = run_job("explain", str(lineage.run), row["row_id"])
    assert told.returncode == 0, told.stderr
    assert row["text"][:50] in told.stdout
    assert f"teacher: {row['label']} ({row['confidence']:.3f}); gold: {row['gold']}" in told.stdout
    own = next(story for story in tell(lineage.run, row["row_id"]) if story.rule == "llkd")
    assert [at["epoch"] for at in own.epochs] == [1, 2]
    for at in own.epochs:
        # Signals are rounded to a grid, finer than anybody reads.
        assert at["confidence"] == pytest.approx(row["confidence"], abs=2e-6)
        sure = at["confidence"] >= at["teacher_threshold"]
        assert at["kept"] == (sure and at["uncertainty"] >= at["student_threshold"])
        verdict = f"kept, weight {at['weight']:.3f}" if at["kept"] else "dropped"
        assert f"epoch {at['epoch']}: teacher is sure {at['confidence']:.3f}" in as_text(own)
        assert verdict in as_text(own)
    assert tell(lineage.run, row["row_id"][:24]) == tell(lineage.run, row["row_id"])


@pytest.mark.slow
def test_a_row_that_is_not_there_says_where_to_look(small_run: Run) -> None:
    run = small_run.lineage.run
    with pytest.raises(ArtifactError, match="row_id of"):
        tell(run, "f" * 32)
    with pytest.raises(ArtifactError, match="more digits"):
        tell(run, "0")
    missing = run_job("explain", str(run / "nowhere"), "0")
    assert missing.returncode == 1
    assert "no student in this run" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1
