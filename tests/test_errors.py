"""The error for an unknown name is the same sentence everywhere."""

import pytest

from qies.errors import UserError, nearest, unknown

ARMS = ("qies", "transformer")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (unknown("arm", "qeis", ARMS), "Unknown arm 'qeis'. Did you mean 'qies'?"),
        (unknown("arm", "zzz", ARMS), "Unknown arm 'zzz'. Known: qies, transformer."),
        (
            unknown("value", "zzz", iter(ARMS), where="for --arm"),
            "Unknown value 'zzz' for --arm. Known: qies, transformer.",
        ),
        (unknown("arm", "zzz", ARMS, otherwise="Write one."), "Unknown arm 'zzz'. Write one."),
        (
            unknown("arm", "qeis", ARMS, otherwise="", note="See --help."),
            "Unknown arm 'qeis'. Did you mean 'qies'? See --help.",
        ),
        (unknown("arm", "zzz", ARMS, otherwise="", note="See --help."), "Unknown arm 'zzz'. See --help."),
        (unknown("key", 7, []), "Unknown key '7'."),
    ],
)
def test_an_unknown_name_is_one_sentence_with_a_hint(given, says):
    assert isinstance(given, UserError) and str(given) == says


def test_only_a_similar_name_is_suggested():
    assert nearest("transfomer", ARMS) == "Did you mean 'transformer'?" and nearest("zzz", ARMS) == ""
