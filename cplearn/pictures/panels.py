"""What `plot_runs.py` shows, in which colors: the page, the picture and the CSV file follow these tables."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """Curves over training with one axis, each named by its field in `log.txt`.

    A field that is not in a log has no curve, and a panel without curves is left out. A value from before the first
    step is also drawn across, as a dashed line.
    """

    title: str
    curves: dict[str, str]  # field -> what it is called beside the others; the second one is dotted
    references: dict[str, str] = field(default_factory=dict)  # levels that the axis reaches: field -> name
    far: dict[str, str] = field(default_factory=dict)  # levels that are only named at the edge if they lie outside
    log: bool = False  # where the values span a factor of ten
    percent: bool = False
    verdict: bool = False  # one of the numbers of the verdict
    help: str = ""


# fmt: off
PANELS = (
    # What the verdict is built on, and what it shows beside that.
    Panel("Score without labels", {"probe_view_nearness": ""}, verdict=True, help="How near an image is to another view of itself, of all of the probe's: 1 if always the nearest, 0 by chance"),
    Panel("Two views get the same code", {"probe_agreement": "", "probe_agreement_chance": "by chance"}, percent=True, verdict=True, help="Of the probe's images"),
    Panel("Codes used", {"probe_codes_used": ""}, {"probe_images": "images"}, verdict=True, help="Different codes on the probe's images"),
    Panel("Effective rank of the features", {"probe_features_rank": ""}, verdict=True, help="RankMe: in how many directions the probe's vectors go"),
    Panel("Effective rank of the embedding", {"probe_embedding_rank": ""}, verdict=True, help="The same, of the head's output"),
    Panel("Participation ratio", {"probe_features_dimensions": "features", "probe_embedding_dimensions": "embedding"}, verdict=True, help="In how many directions the probe's vectors vary; small ones hardly count"),
    # How the run trains.
    Panel("Loss", {"train_loss": ""}, {"loss_uniform": "uniform", "loss_floor": "bound"}, {"loss_one_code": "one code"}, help="Beside what uniform assignments have, and what it cannot fall below"),
    Panel("Loss, from uniform to the bound", {"uniform_to_floor": ""}, percent=True, help="Share of a way that mostly has no end: for runs of the same batch, codes and n_ref only"),
    Panel("Perplexity of the codes", {"usage_perplexity": ""}, far={"out_dim": "codes"}, log=True, help="How many codes are in use, weighted by use, in windows of 20 steps"),
    Panel("Information", {"information": ""}, help="Nats that an assignment tells about its image"),
    Panel("Cosine of two images", {"probe_features_cosine": "features", "probe_embedding_cosine": "embedding"}, help="Mean over the probe; 1 if all images are the same to the network"),
    Panel("Prototypes that differ", {"probe_unique_prototypes": ""}, far={"probe_prototypes": "looked at"}, log=True, help="Of learned codes: without the copies (partial prototype collapse)"),
    Panel("20-NN accuracy", {"probe_knn20": ""}, percent=True, help="Among the probe's training images, by their labels (--knn_freq)"),
    Panel("Learning rate", {"lr": ""}, help="At the last step of the epoch"),
    Panel("Gradient norm", {"train_grad_norm": ""}, log=True, help="Of the whole gradient, before clipping"),
    Panel("Images per second", {"images_per_second": ""}, help="All processes together"),
    Panel("Waiting for images", {"data_wait": ""}, percent=True, help="Share of the time"),
)
# fmt: on

CURVES = tuple(dict.fromkeys(name for panel in PANELS for name in panel.curves))
LEVELS = tuple(dict.fromkeys(name for panel in PANELS for name in (*panel.references, *panel.far)))

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#7a5195", "#6b6b6b")  # of runs
VERDICTS = {"learning": "#8fd0a8", "no better than at the start": "#f2c14e", "losing dimensions": "#f4a6c0",
            "no alarm": "#bfd7ea", "too short to judge": "#dddddd", "stuck at uniform": "#a0a0a0",
            "representation": "#c1272d", "cluster": "#ee8833", "dimensional": "#7a3fa0",
            "intracluster": "#2f5fb3"}  # fmt: skip
DARK = ("representation", "dimensional", "intracluster")  # of these, on which words are white
OTHER = "#d6e685"  # a verdict of another version
