"""Which documents are held out: by a hash of their text alone."""

from __future__ import annotations

from sentcompress.text.heldout import choose_heldout, text_hash


class TestHeldout:
    def held(self, texts: list[bytes], wanted: int) -> set[int]:
        return choose_heldout(b"".join(map(text_hash, texts)), wanted)

    def chosen(self, texts: list[bytes], wanted: int) -> set[bytes]:
        return {texts[index] for index in self.held(texts, wanted)}

    def test_the_same_texts_whatever_their_order(self) -> None:
        texts = [bytes([value]) for value in (9, 3, 7, 1, 5, 8)]
        assert self.chosen(texts, 2) == self.chosen(texts[::-1], 2)
        assert self.chosen(texts, 2) == set(sorted(texts, key=text_hash)[:2])

    def test_one_more_document_moves_at_most_one(self) -> None:
        texts = [bytes([value]) for value in (9, 3, 7, 1, 5, 8)]
        for more in (b"\x02", b"\x04", b"\x06"):
            assert len(self.chosen(texts, 3) - self.chosen([*texts, more], 3)) <= 1

    def test_copies_are_on_one_side_and_something_is_left(self) -> None:
        a, b, c = sorted([b"a", b"b", b"c"], key=text_hash)
        assert self.held([b, a, a, c, a], 1) == {1, 2, 4}
        assert self.held([a, a, b], 1) == {0, 1}
        assert self.held([b, b, b, a], 3) == {3}
