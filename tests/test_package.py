"""What the package shows of itself."""

import qies


def test_dir_shows_the_public_names_and_each_can_be_had():
    assert dir(qies) == sorted(qies.__all__)
    assert {"QiesConfig", "QiesForCausalLM", "entangle", "__version__"} <= set(dir(qies))
    assert all(getattr(qies, name) is not None for name in dir(qies))


def test_states_are_captured_from_where_they_are_measured():
    from qies.entanglement import capture, entropies, von_neumann_entropy

    assert callable(capture) and callable(entropies) and callable(von_neumann_entropy)
