import pytest

from qies.data.builder.tokenizer import save_tokenizer, train_tokenizer
from qies.data.sources.stories import stories
from qies.data.tokenizer import load_tokenizer


@pytest.fixture(scope="package")
def tokenizer(tmp_path_factory):
    """A tokenizer of 400 tokens, trained on stories."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([text for _, text in stories(0, 30)], 400), folder)
    return load_tokenizer(folder)
