"""Overlapping windows over a text that is longer than a model's input."""

import numpy as np


def windows_of(n_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """The windows [(begin, end), ...] over tokens; the first to reach the end is the last."""
    stride = min(stride, room)
    begins = range(0, max(n_tokens - room, 0) + stride, stride)
    return [(begin, min(begin + room, n_tokens)) for begin in begins]


def best_windows(n_tokens: int, windows: list[tuple[int, int]]) -> np.ndarray:
    """For each token the window in which the smaller of its two contexts is largest."""
    best_window = np.zeros(n_tokens, np.int32)
    best_score = np.full(n_tokens, -1.0)
    for n, (begin, end) in enumerate(windows):
        position = np.arange(end - begin)
        score = np.minimum(position, position[::-1]) + 0.01 * (end - begin)
        better = score > best_score[begin:end]
        best_score[begin:end][better] = score[better]
        best_window[begin:end][better] = n
    return best_window
