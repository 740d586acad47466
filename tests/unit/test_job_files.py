from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ted_ds.job.files import missing, new_folder


def test_one_process_makes_a_folder_and_the_others_wait_for_it(tmp_path: Path) -> None:
    """Jobs of an array share prepared data and start at once."""
    folder, made = tmp_path / "shared" / "train", []

    def job() -> None:
        with missing(folder) as absent:
            if absent:
                with new_folder(folder) as new:
                    time.sleep(0.05)
                    (new / "rows").write_text("whole")
                    made.append(folder)
        assert (folder / "rows").read_text() == "whole"

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(job) for _ in range(6)]:
            done.result()
    assert made == [folder]
    folder.with_name("train.lock").unlink()
    with missing(folder) as absent:  # finished data may be read-only: nothing is written beside them
        assert not absent and not folder.with_name("train.lock").exists()
