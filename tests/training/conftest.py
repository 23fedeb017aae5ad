"""What the tests of several parts of the trainer start from."""

import pytest
from helpers.models import language_rows, lora_bert, lora_llama, rows

KINDS = {"classifier": (lora_bert, rows), "language model": (lora_llama, language_rows)}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    """(a function that builds the model, a function that makes so many rows)."""
    return request.param
