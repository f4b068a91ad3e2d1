"Work in threads comes back in order, shares the cores by place, and ends when it is not wanted."
import threading
import time
from contextlib import closing

import pytest
import torch

from evoprune_nb.machine.threads import in_order, widths


def test_side_by_side_shares_the_cores_in_order():
    "Full rows share the cores, what is left over shares them anew, a single one has them all; that depends on the place alone, wherever one begins. Results come in order; at most one more than there are threads has begun."
    cores, begun, threads = {}, [], torch.get_num_threads()

    def work(item, check_cancelled):
        begun.append(item)
        cores[item] = torch.get_num_threads()
        time.sleep(0.01 * (9 - item))
        return item

    try:
        torch.set_num_threads(6)
        for n_jobs, side_by_side, shares in ((1, [1] * 8, [6] * 8), (3, [3] * 6 + [2] * 2, [2] * 6 + [3] * 2), (7, [7] * 7 + [1], [1] * 7 + [6]), (20, [8] * 8, [1] * 8)):
            assert widths(8, n_jobs) == side_by_side
            for start in (0, 4, 7):
                cores.clear()
                results = in_order(work, range(8), n_jobs, start)
                for item in range(start, 8):
                    begun.clear()
                    assert next(results) == item and torch.get_num_threads() == 6 and len(begun) <= n_jobs + 1
                assert list(results) == [] and cores == dict(zip(range(start, 8), shares[start:]))
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="n_jobs must be a whole number from 1; got 0"):
        list(in_order(work, range(8), 0))


def test_work_side_by_side_ends_when_it_is_not_wanted():
    "An error in one, or closing, ends the others at their next step; what is asked for again begins anew."
    begun, finished = [], []

    def work(item, check_cancelled):
        begun.append(item)
        if item == "bad":
            raise RuntimeError("out of memory")
        for _ in range(500 if item == "long" else 1):
            check_cancelled()
            time.sleep(0.01)
        finished.append(item)
        return item

    n_threads = threading.active_count()
    with closing(in_order(work, ["short", "long", "x", "y"], 2)) as results:
        assert next(results) == "short"
    assert "long" in begun and "long" not in finished and threading.active_count() == n_threads
    with pytest.raises(RuntimeError, match="out of memory"):
        next(in_order(work, ["bad", "long"], 2))
    assert "long" not in finished and threading.active_count() == n_threads
    assert list(in_order(work, ["short", "short2"], 2)) == ["short", "short2"]
