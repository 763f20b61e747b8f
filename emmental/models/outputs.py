"""Which output of a model a label means: that of the same name, else the only similar one."""

import collections
import re
from collections.abc import Mapping

WHOLE = re.compile(r"([+-]?\d+)\.0+")


def whole_number(text: str) -> str:
    """1 for 1.0, as tools write the whole numbers of a column with a gap; other texts as is."""
    match = WHOLE.fullmatch(text)
    return match[1] if match else text


class Outputs(dict):
    """The outputs of a model: {name: index}."""

    def __init__(self, indices: Mapping[str, int]):
        super().__init__(indices)
        counts = collections.Counter(map(self._similar, self))
        once = [name for name in self if counts[self._similar(name)] == 1]
        self._alone = {self._similar(name): self[name] for name in once}

    def find(self, label: str) -> int | None:
        """The index of a label. Case and the .0 of whole numbers may differ if one output fits."""
        return self[label] if label in self else self._alone.get(self._similar(label))

    @staticmethod
    def _similar(name: str) -> str:
        return whole_number(name).casefold()
