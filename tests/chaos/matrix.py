"""The rows of the fault matrix that are proven outside this folder too, and where.
:mod:`tests.chaos.test_matrix` holds the list against the tests."""

from __future__ import annotations

NUM_ROWS = 40
_RUN = "tests/unit/data/test_run.py"

ELSEWHERE: dict[int, tuple[str, ...]] = {
    1: ("tests/integration/test_recovery.py::test_a_big_shard_feeds_two_workers_and_outlives_one",),
    3: (f"{_RUN}::test_a_part_whose_worker_died_before_the_record_is_taken_over",),
    4: ("tests/unit/data/test_s3.py::test_a_lost_answer_is_read_back_as_ours",),
    6: ("tests/unit/data/test_s3.py::test_a_lost_request_is_sent_again",),
    10: ("tests/integration/test_recovery.py::test_nothing_that_was_journaled_is_generated_again",),
    11: ("tests/integration/test_failures.py::test_death_of_the_own_ray",),
    12: (f"{_RUN}::test_two_drivers_make_one_plan",),
    13: (f"{_RUN}::test_a_crash_between_manifest_and_success_is_mended",),
    14: ("tests/integration/test_recovery.py::test_a_drain_hands_over_every_token",),
    21: ("tests/integration/test_failures.py::test_hung_worker_is_replaced",),
    22: ("tests/integration/test_recovery.py::test_rows_that_kill_become_error_rows",),
    25: ("tests/unit/engine/test_sampler.py::test_a_row_that_is_not_finite_is_reported_alone",),
    27: ("tests/unit/data/test_s3.py::test_a_storm_of_refusals_is_no_storm_of_requests",),
    30: (
        "tests/unit/data/test_reader.py::test_an_object_replaced_while_it_is_read_is_a_shard_error",
    ),
    31: (
        "tests/integration/test_runs.py::test_damaged_shard_fails_and_the_rest_is_done",
        "tests/unit/data/test_inputs.py::test_files_that_are_no_parquet_are_named",
        "tests/unit/data/test_reader.py::test_pages_spoiled_anywhere_never_raise_anything_else",
    ),
    32: (
        "tests/unit/data/test_reader.py::test_a_parquet_bomb_stays_small",
        "tests/unit/data/test_reader.py::test_a_footer_that_lies_about_rows_is_a_shard_error",
    ),
    35: ("tests/unit/data/test_journal.py::test_a_torn_object_costs_its_end_only",),
    38: ("tests/unit/data/test_lock.py::test_a_silent_holder_is_followed_after_20_seconds",),
}
