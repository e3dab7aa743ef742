"""The modality protocol."""

from lapilli.modality import Modality


def test_something_without_embed_is_no_modality():
    class Silent:
        name = "silent"

        def prepare(self, raw):
            return raw

        def num_tokens(self, prepared):
            return 1

    assert not isinstance(Silent(), Modality)
    Silent.embed = lambda self, items: []
    assert isinstance(Silent(), Modality)
