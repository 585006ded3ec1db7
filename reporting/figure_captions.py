"""How each figure is to be read: the captions, in which {names} are filled in by task_figures.py."""

ACCURACY_POINTS = (
    "Large: mean over seeds, black: its 95 % t interval, where n is at least 2; small, below: each seed. "
    "Lines: guessing, always naming the largest class{published}. The axis does not start at 0."
)
PUBLISHED_DRAWN = ", and published test accuracies of the Long Range Arena"
PUBLISHED_LEFT_OUT = (
    "; published accuracies of the Long Range Arena are not drawn, since they hold for its full data and "
    "this run had other data settings"
)
CURVES = (
    "Thick: mean over the finished seeds, as far as all of them ran; band: from the smallest to the largest "
    "seed; thin: each seed. Dotted, ending in a cross: a cell that did not finish. Training accuracy is "
    "taken while the weights change and dropout is on, so it may lie below validation."
)
PROGRESS = (
    "Left and middle: validation accuracy against the training time and the tokens spent so far, a point "
    "per epoch; thick: mean over the finished seeds, as far as all of them ran; thin: each seed. Further "
    "left is cheaper. Right: test accuracy against the training time to the best epoch; large: means, with "
    "the 95 % t interval of accuracy where n is at least 2; small: seeds; up and left: more for less; no "
    "model on the dashed line is beaten in both. Times hold for this machine and leave out evaluation; "
    "their axes are logarithmic where they span much."
)
BARS = "Bar: mean over seeds; marks: one per seed; black: 95 % t interval of the mean, where n is at least 2."
CONVERGENCE = (
    "Fewer is faster. Left: the first epoch at 90 % of the best validation accuracy, which guessing already "
    "meets on two classes. Right: 90 % of the way from chance to the best."
)
COST = (
    "Times hold for this machine only: compare models, not runs on different machines. Peak memory on a CPU "
    "counts the whole process, its libraries included."
)
IMPROVEMENT = (
    "In percent of {name}'s value with the same seed: right of 0 the model gains accuracy or saves epochs, "
    "time or memory. Marks: one per seed; black: mean and 95 % t interval, where n is at least 2. An "
    "interval that holds 0 is no sign of a difference."
)
RADAR = (
    "Each axis is scaled to the best model of this task, from means over seeds: accuracy / the highest "
    "accuracy; the fewest epochs to converge (above chance) / epochs; the shortest time per epoch / time; "
    "the smallest peak memory / memory. 0.5 is half as good as the best. An open line: a model without that "
    "number. The area has no meaning, and the radar shows no uncertainty."
)
ATTENTION = (
    "Weights before dropout, for {cut} one validation example (seed {seed}); {parts}. In each map, row: the "
    "query; column: the key it attends to. Bright: more weight, on a square-root scale that the maps share; "
    "the scale differs between models. A bright diagonal looks at near tokens, a bright column at one token "
    "from everywhere."
)
DISTANCE = (
    "Share of a query's weight per token of distance, in bins that double in width, on logarithmic axes; "
    "mean over queries of long validation examples, heads and seeds. Even weights are level, and fall at "
    "the right, where few pairs are so far apart. Left: mean over timescales. Others: each timescale of one "
    "model; grey: what its learned gamma^d alone would do to weights (mean over heads), through the measured "
    "value at distance 1."
)
MASSES = (
    "Mass of a token as a key over the mean mass of its example, mean over layers, timescales, heads, "
    "examples and seeds; in brackets how often it occurs there. 1: an average token. A token that occurs "
    "once or twice says little."
)
SHADED = (
    "The longest of the short validation examples that are kept (seed {seeds}), at most its first 64 "
    "tokens. Orange: heavier as a key than the mean of the example, so that it pulls more weight; violet: "
    "lighter; mean over layers, timescales and heads. The scale is shared, and as wide as the masses are "
    "apart: look at its ends first."
)
LEARNED = (
    "Horizon 1 / (1 - gamma): the distance in tokens over which the weight (with discount=logits: the logit) "
    "falls to about a third; t: timescale. G: strength of gravity, 1 at the start. Line: one per layer and "
    "timescale, mean over heads and seeds; band: smallest to largest. A flat line has learned nothing."
)
