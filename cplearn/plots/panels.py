"""What `plot_runs.py` shows: one entry per panel. The page, the picture and the CSV file follow this table."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Panel:
    """Curves over training with one axis, each named by its field in `log.txt`.

    A field that is not in a log has no curve, and a panel without curves is left out.
    """

    title: str
    curves: dict[str, str]  # field -> what it is called beside the others; the second one is dashed
    references: dict[str, str] = field(default_factory=dict)  # levels that the axis reaches: field -> name
    far: dict[str, str] = field(default_factory=dict)  # levels that are only named at the edge if they lie outside
    log: bool = False  # where the values span a factor of ten
    percent: bool = False
    help: str = ""


# fmt: off
PANELS = (
    Panel("Loss", {"train_loss": ""}, {"loss_uniform": "uniform", "loss_floor": "bound"}, {"loss_one_code": "one code"}, help="Between what uniform assignments have and what it cannot fall below"),
    Panel("Loss, from uniform to the bound", {"uniform_to_floor": ""}, percent=True, help="Share of a way that mostly has no end: for runs of the same batch, codes and n_ref only"),
    Panel("Perplexity of the codes", {"usage_perplexity": ""}, far={"out_dim": "codes"}, log=True, help="How many codes are in use, weighted by use, in windows of 20 steps"),
    Panel("Codes used", {"codes_used": "in 20 steps", "probe_codes_used": "by the probe"}, far={"out_dim": "codes"}, help="Codes that got half an image or more"),
    Panel("Information", {"information": ""}, help="Nats that an assignment tells about its image"),
    Panel("Effective rank", {"probe_features_rank": "features", "probe_embedding_rank": "embedding"}, help="RankMe of the probe: in how many directions its vectors go"),
    Panel("Cosine of two images", {"probe_features_cosine": "features", "probe_embedding_cosine": "embedding"}, help="Mean over the probe; 1 if all images are the same to the network"),
    Panel("Two views get the same code", {"probe_agreement": "", "probe_agreement_chance": "by chance"}, percent=True, help="Of the probe's images"),
    Panel("Score without labels", {"probe_score": ""}, help="Log of how much more often than by chance two views get the same code"),
    Panel("20-NN accuracy", {"probe_knn20": ""}, percent=True, help="Among the probe's training images, by their labels (--knn_freq)"),
    Panel("Learning rate", {"lr": ""}, help="At the last step of the epoch"),
    Panel("Gradient norm", {"train_grad_norm": ""}, log=True, help="Of the whole gradient, before clipping"),
    Panel("Images per second", {"images_per_second": ""}, help="All processes together"),
    Panel("Waiting for images", {"data_wait": ""}, percent=True, help="Share of the time"),
)
# fmt: on

CURVES = tuple(dict.fromkeys(name for panel in PANELS for name in panel.curves))
LEVELS = tuple(dict.fromkeys(name for panel in PANELS for name in (*panel.references, *panel.far)))
