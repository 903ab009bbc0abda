"""Peak memory in a fresh process: it sees what a column materialises."""

from benchmarks import memory


def test_materialised_gradients_are_seen():
    plain, hooks, wrong = memory.measure_columns("mlp16", ["non-private", "gsm hooks", "no such column"])
    parameters = 1_863_690 * 4
    assert plain.peak > 2 * parameters  # weights and gradients
    assert hooks.peak > plain.peak + 14 * parameters  # sixteen samples, less what the allocator reuses
    assert wrong.peak is None and wrong.failure.startswith("KeyError")


def test_the_batch_can_be_changed():
    small, large = (memory.measure_columns("mlp16", ["gsm hooks"], batch=n)[0].peak for n in (2, 16))
    assert large > 3 * small


def test_what_is_live_is_at_most_what_is_resident():
    (resident,), (live,) = (memory.measure_columns("mnist", ["gsm hooks"], live=own) for own in (False, True))
    if live.failure is None:  # glibc
        assert 0 < live.peak < 1.05 * resident.peak


def test_the_present_size_is_at_most_the_peak():
    peak, now = memory.resident()
    assert 0 < now <= peak
