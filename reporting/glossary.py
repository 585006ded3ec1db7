"""What the models and tasks are, in a line each, for a reader of the report who knows none of them.

in_a_line(TASKS, "hold")                                 # "Values, some of them flagged: ..."
in_a_line(MODELS, "gravitational,softening=0.01")        # that of "gravitational"
"""

from collections.abc import Mapping

MODELS = {
    "conventional": "softmax attention: a token looks where its query points along a key",
    "gravitational": "keys attract a query by their mass over the squared distance between the two",
    "multi_timescale": "several softmax attentions (three by default), whose weights fade with the distance "
    "between tokens at a learned rate of each, and a decoder that joins what they read",
    "gravitational_multi_timescale": "gravity, fading at several rates (three by default), with the decoder",
    "discounted": "a control: softmax attention whose weights fade at one learned rate in each head",
    "per_head_decay": "a control: softmax attention whose weights fade at a learned rate in each head, from "
    "fast to slow at the start",
    "adaptive": "softmax attention whose weights fade with a time that each token lets pass faster or slower",
}
TASKS = {
    "imdb": "A film review: is it positive or negative?",
    "listops": "Nested operations on lists of digits: the value, 0 to 9.",
    "pathfinder": "A picture: are two marked ends joined by a dashed path?",
    "image": "A small grey photograph: which of ten things does it show?",
    "bytes": "Film reviews: which byte is next? In bits per byte, of which fewer are better.",
    "recall": "A sequence: pairs of a key and a value, then the keys again: the value of each.",
    "hold": "Values, some of them flagged: at each token the value last flagged; positions are not given.",
    "latest": "Variables, written and read in turn: at a read the value last written.",
    "nearest": "A set of points with labels: at another point the label of the nearest.",
    "lookup": "A set, without order: keys with their values, and the keys again: the value of each.",
}


def in_a_line(said: Mapping[str, str], name: str) -> str:
    """What is said of a task or model, of the latter whatever its settings; "" of one of somebody's own."""
    return said.get(name.split(",")[0], "")
