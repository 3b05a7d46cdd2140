"""Which of several errors is told."""

from cplearn.slurm.status import the_cause


def test_the_error_to_tell_is_the_one_that_others_follow_from():
    def end(rank, code, at):
        return {"rank": rank, "code": code, "time": at, "line": ""}

    peer, mine, late = end(0, 6, 1.0), end(1, 2, 2.0), end(2, 3, 3.0)
    assert the_cause([peer, mine, late]) == mine
    assert the_cause([end(3, 0, 0.0), peer, end(4, 75, 1.0)]) == peer
    assert the_cause([end(0, 0, 1.0), end(1, 75, 1.0)]) is None
