"""What every tokenizer says of its vocabulary alike: ids by role, added tokens, special ids."""

from lapilli.prompt.tokenizer.added import AddedTokens
from lapilli.prompt.tokenizer.special import AddedToken, SpecialTokens


class Roles:
    """The part of the Tokenizer protocol that does not depend on the library underneath.

    A tokenizer sets `_special`, `_added` and `_special_ids`, and overrides `token_to_id`.
    """

    _special: SpecialTokens
    _added: AddedTokens
    _special_ids: frozenset[int]

    @property
    def bos_id(self) -> int | None:
        """Begin of sequence."""
        return self._id_of("bos")

    @property
    def eos_id(self) -> int | None:
        """End of sequence."""
        return self._id_of("eos")

    @property
    def pad_id(self) -> int | None:
        """Padding; Llama's own files name none."""
        return self._id_of("pad")

    @property
    def unk_id(self) -> int | None:
        """What text becomes that no token covers."""
        return self._id_of("unk")

    @property
    def added_vocab(self) -> dict[str, int]:
        """Added tokens and their ids, the special ones among them."""
        return dict(self._added.ids)

    @property
    def named_tokens(self) -> dict[str, str]:
        """Texts of the special tokens by the names of chat templates, such as `pad_token`."""
        return {f"{role}_token": token.content for role, token in self._special.named.items()}

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """Added tokens by id, with how they are cut out of a text."""
        return dict(self._added.tokens)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode(skip_special=True)` leaves out."""
        return self._special_ids

    def _id_of(self, role: str) -> int | None:
        name = self._special.content(role)
        return None if name is None else self.token_to_id(name)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token, None where it is not in the vocabulary."""
        raise NotImplementedError
